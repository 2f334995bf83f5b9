"""The bounds on what comes from outside: sizes, counts and seconds. Each is checked before the work that it bounds."""

from __future__ import annotations

MAX_MESSAGE = 400  # characters of an error message: one line that fits a terminal window

# safetensors files. The largest open models have 100,000 to 200,000 tensors in all.
MAX_HEADER = 40_000_000  # bytes of a header: parsed, it takes about twenty times as much memory
MAX_TENSORS = 300_000  # tensors of a checkpoint: reading their list takes seconds
MAX_TENSOR_NAME = 1000  # characters of a tensor's name
MAX_AXES = 64  # axes of a tensor: torch has no more
MAX_UNKNOWN_VALUES = 1 << 26  # values of all tensors outside the config, unless the model itself has more
MAX_NAMES_COMPARED = 10_000  # names that are compared with a misspelt one: each takes about 20 microseconds

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
MAX_CARD = 10_000_000  # bytes of a model card
MAX_RECORD = 16_000_000  # bytes of a donor.json, a headstart.json or a training record

# Writing
MAX_LOCK_WAIT = 60  # seconds that a process waits for another one that writes the same file, which takes milliseconds

# Hubs. huggingface.co recommends at most 100,000 files in a repository.
HUB_TIMEOUT = 60.0  # seconds without progress after which a hub is given up; --timeout changes it
HUB_PROGRESS = 1 << 16  # bytes of a body that count as progress within the timeout: 1 KB a second, as an old modem
MAX_ASKED_WAIT = 300  # seconds that a hub may ask to wait, in all: huggingface.co limits requests per five minutes
MAX_HUB_JSON = 32_000_000  # bytes of all JSON that a hub answers to one call: lists of 100,000 files
MAX_HUB_FILES = 100_000  # files that a hub lists in answer to one call
MAX_HUB_VALUES = 2_000_000  # values of such an answer
MAX_HUB_PAGES = 1000  # pages of such a list: huggingface.co puts a thousand files on a page
MAX_HUB_HEAD = 1 << 18  # bytes before the body of an answer: real ones have a few thousand
MAX_HUB_TAGS = 1000  # tags of a repository
MAX_FILE_PATH = 1000  # characters of a file's path in a repository
MAX_UNSTATED_FILE = 32_000_000  # bytes of a file whose size a hub does not state: weights always have one
MAX_FILE_TRANSFER = 3  # times that the bytes of a file are downloaded in one call, when it breaks off again and again
