"""One file a verifier; `rewards/registry.py` lists them."""
