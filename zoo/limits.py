"""The bounds on what comes from outside: sizes, counts and seconds. Each is checked before the work that it bounds."""

from __future__ import annotations

MAX_MESSAGE = 400  # characters of an error message: one line that fits a terminal window

# safetensors files. The largest open models have 100,000 to 150,000 tensors in all, scales of quantised ones included.
MAX_HEADER = 40_000_000  # bytes of a header: parsed, it takes about twenty times as much memory
MAX_TENSORS = 200_000  # tensors of a checkpoint: reading their list takes a second or two
MAX_SHARDS = 2000  # safetensors files of a checkpoint: the largest models have a few hundred
MAX_TENSOR_NAME = 1000  # characters of a tensor's name
MAX_AXES = 64  # axes of a tensor: torch has no more
MAX_UNKNOWN_VALUES = 1 << 26  # values of all tensors outside the config, unless the model itself has more
MAX_HASHED_UNCHECKED = 1 << 30  # bytes of a donor that `verify` hashes before it compares their header with the config
MAX_NAMES_COMPARED = 10_000  # names that are compared with a misspelt one: each takes about 20 microseconds

# GGUF files
MAX_GGUF_HEADER = 256_000_000  # bytes before the tensors: a vocabulary of 262,144 tokens takes 6.5 million
MAX_GGUF_KEYS = 10_000  # keys of the metadata: real files have 20 to 60
MAX_GGUF_KEY = 65_535  # bytes of a key's name, as the format says
MAX_GGUF_VALUES = 4_000_000  # values of all lists: a vocabulary of 900,000 tokens has three lists, or merges
MAX_GGUF_AXES = 4  # axes of a tensor: ggml has no more
MAX_GGUF_ALIGNMENT = 1 << 20  # bytes: real files have 32
GGUF_TOKENIZER_SECONDS = 4  # seconds of CPU for a tokenizer of a GGUF file: a small one needs a tenth
GGUF_TOKENIZER_SECONDS_PER_MB = 2.5  # more seconds for each megabyte of its lists: one of 8.5 MB needs ten
GGUF_TOKENIZER_MEMORY = 400_000_000  # bytes for a tokenizer of a GGUF file
GGUF_TOKENIZER_MEMORY_PER_BYTE = 100  # more bytes for each byte of its lists: one of 10 MB needs forty

# Model cards. The longest front matters, with thousands of evaluation results, have a few hundred thousand bytes.
MAX_FRONT_MATTER = 1_000_000  # bytes of a README.md that are read
MAX_FRONT_MATTER_DEPTH = 100  # levels of nested YAML: libyaml's time grows with their square
MAX_LICENSE = 200  # characters of a licence's name

# JSON and YAML. Parsed, a value takes 60 to 180 bytes.
MAX_JSON = 64_000_000  # bytes of a JSON file: the largest tokenizers have 35 million
MAX_JSON_VALUES = 3_000_000  # values of a JSON file: a tokenizer of 900,000 tokens has 2.7 million
MAX_KEYS = 1_000_000  # keys of a JSON object: the largest vocabularies have 900,000 tokens
MAX_NESTING = 100  # levels of lists and objects: real files have up to ten, Python's stack allows some hundred
MAX_DIGITS = 100  # digits of a whole number: longer ones are neither sizes nor ids, and do not fit a float
MAX_CONFIG = 4_000_000  # bytes of a config.json: 21,000 labels take 1.6 million
MAX_YAML = 250_000  # bytes of a YAML file: PyYAML takes a second for 100,000 values
MAX_YAML_VALUES = 100_000  # values of a YAML file with its aliases written out
MAX_RECORD = 16_000_000  # bytes of a donor.json, a headstart.json or a training record

# Work of a library in a child process (zoo.sandbox).
TOKENIZER_SECONDS = 2  # seconds of CPU for a tokenizer without a text: the usual ones need a tenth
TOKENIZER_SECONDS_PER_MB = 0.2  # more seconds for each megabyte of a tokenizer's files: one of 33 MB needs three
TEXT_SECONDS_PER_MB = 30  # more seconds for each megabyte of text: the usual tokenizers need three
TOKENIZER_MEMORY = 400_000_000  # bytes for a tokenizer without a text: the usual ones need a tenth
TOKENIZER_MEMORY_PER_BYTE = 20  # more bytes for each byte of a tokenizer's files: one of 33 MB needs eleven
TEXT_MEMORY_PER_BYTE = 600  # more bytes for each byte of text: a text of one token per byte needs 300
PATTERN_SECONDS = 1  # seconds of CPU for all regular expressions of an adapter: the usual ones need a thousandth
PATTERN_MEMORY = 200_000_000  # bytes for all regular expressions of an adapter
MANIFEST_SECONDS = 3  # seconds of CPU for reading a manifest: a million rows take one
MANIFEST_MEMORY = 600_000_000  # bytes for reading a manifest
MAX_CHILD_REPLY = 1 << 30  # bytes that the child process answers: token ids take eight each

# Texts to train on. Each byte of text takes eight bytes of memory as a token of a byte vocabulary.
MAX_CORPUS = 256_000_000  # bytes of text that are read: a run of a million windows of 64 tokens sees as many
LEAST_TRAINING_TEXT = 40_000  # bytes of a text that donors learn: ten blocks of 4096, of which two are held out
MAX_CORPUS_NAME = 40  # characters of the name of such a text: it is part of the names of folders
MAX_CORPUS_FILES = 10_000  # files of a folder or data set: those of the hub have up to a few thousand
MAX_HUB_CORPUS_FILE = 1 << 33  # bytes of a file of a data set: the hub's guidelines ask for files below 5 GB
MAX_EXPANSION = 30  # bytes of text for each byte of a compressed file: Parquet packs text to a third or less
CORPUS_SECONDS = 20  # seconds of CPU for `datasets` without a text: it needs one or two
CORPUS_SECONDS_PER_MB = 10  # more seconds for each megabyte of text: short documents need one
CORPUS_MEMORY = 600_000_000  # bytes for `datasets` without a text: JSON is read in pieces of 10 MB
CORPUS_MEMORY_PER_BYTE = 4  # more bytes for each byte of text: the text and its copies

MAX_QUESTIONS = 200_000_000  # bytes of a file of questions: HellaSwag has 40 million

# Writing
MAX_LOCK_WAIT = 60  # seconds that a process waits for another one that writes the same file, which takes milliseconds

# Several processes (zoo.parallel.processes)
PROCESS_CONNECT_SECONDS = 300  # seconds that a process waits for the others to start: machines of a cluster differ
PROCESS_END_SECONDS = 10  # seconds that the process that holds their store waits for the others to end

# Hubs. huggingface.co recommends at most 100,000 files in a repository.
HUB_TIMEOUT = 60.0  # seconds without progress after which a hub is given up; --timeout changes it
HUB_PROGRESS = 1 << 16  # bytes of a body that count as progress within the timeout: 1 KB a second, as an old modem
MAX_ASKED_WAIT = 300  # seconds that a hub may ask to wait, in all: huggingface.co limits requests per five minutes
MAX_HUB_JSON = 32_000_000  # bytes of all JSON that a hub answers to one call: lists of 100,000 files
MAX_HUB_FILES = 100_000  # files that a hub lists in answer to one call
MAX_HUB_VALUES = 2_000_000  # values of such an answer
MAX_HUB_PAGES = 200  # pages of such a list: huggingface.co puts a thousand files on a page
MAX_HUB_HEAD = 1 << 17  # bytes before the body of an answer: real ones have a few thousand
MAX_HUB_TAGS = 1000  # tags of a repository
MAX_FILE_PATH = 1000  # characters of a file's path in a repository
MAX_UNSTATED_FILE = 32_000_000  # bytes of a file whose size a hub does not state: weights always have one
MAX_FILE_TRANSFER = 3  # times that the bytes of a file are downloaded in one call, when it breaks off again and again

# config.json. The largest open models have 126 layers, 512 experts of a layer and a width of 18,432.
MAX_LAYERS = 512  # layers, blocks or stages: each takes milliseconds to build
MAX_EXPERTS = 16_384  # experts of a layer: Doge has as many, each of one row
MAX_EXPERT_MATRICES = 100_000  # matrices of experts that are stored one by one: the largest models have 50,000 fused
MAX_LABELS = 100_000  # labels of a classifier: ImageNet-21k has 21,843
MAX_CONFIG_LIST = 10_000  # entries of a list in a config: lists have one per layer, or one per frequency
MAX_CONFIG_SIZE = 1 << 24  # any other size in a config: the largest are contexts of 10 million tokens
MAX_CONFIG_NUMBER = (1 << 63) - 1  # a whole number that is no size, such as a seed
MAX_MODULES = 15_000  # modules, parameters and buffers of a model, without experts: the largest models have 8000
MAX_BUFFER_VALUES = 1 << 28  # values of all buffers, such as causal masks: the largest have 150 million
MAX_EXPERT_MODULES = 80_000  # modules of experts that are not fused: Switch Transformers have 72,000

# Options of commands.
MAX_OPTION = 100_000  # characters of a value
MAX_PATH = 4096  # bytes of a path, as on Linux
MAX_FILE_NAME = 255  # bytes of a name in a path, as in the usual file systems
LEAST_INTEGER, MOST_INTEGER = -(2**63), 2**64 - 1  # of options; torch takes no other seeds

# adapter_config.json
MAX_RANK = 65_536  # a larger rank is above every width
MAX_ADAPTER_NUMBER = 1_000_000  # any other number of an adapter, such as lora_alpha
MAX_PATTERNS = 500  # names or regular expressions of an adapter: PEFT compiles more of them again for every module
MAX_PATTERN = 1000  # characters of a name or regular expression of an adapter
MAX_PISSA_STEPS = 100  # steps of `pissa_niter_N`: 16 are usual, and each multiplies every weight

# Zoos
MAX_ROWS = 1_000_000  # rows of a manifest, one for each tensor: a thousand models of 7 billion weights have 300,000
MAX_MANIFEST = 300_000_000  # bytes of a manifest, on disk or in memory
