"""How far the singular values of layers are apart in really trained models, and in adapters that follow them
(2509.00046)."""
