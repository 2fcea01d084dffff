"""Other people's expert kernels, each in an environment and a process of its own.

`client` starts and drives a peer from here; `host` is what runs over there, with one of the
adapters beside it (`kt_kernel`, `llama_cpp`). Nothing of a peer is ever imported into ktlab.
"""
