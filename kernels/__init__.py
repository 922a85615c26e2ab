"""Attention over a stream's memory: operators, their Triton kernels and their plain PyTorch reference.

`operators` is what to call: `torch.library` operators that run the Triton kernels on CUDA and the reference elsewhere.
`reference` says in a few lines of PyTorch what each computes. `temporal`, `prefill` and `decode` hold the kernels, and
`aot` compiles them without a GPU.

Spatial attention is not here: it is `scaled_dot_product_attention`.
"""
