"""Attention over a stream's memory, and what stands around it: operators, their kernels and their PyTorch reference.

`operators` is what to call: `torch.library` operators that run the Triton kernels on CUDA and the reference elsewhere.
`reference` says in a few lines of PyTorch what each computes. `temporal`, `prefill`, `decode`, `residual_norm`,
`rotary` and `block_linear` (products with weights of 4 and 8 bits) hold the kernels, `softmax` and `merge` what several
of them share, `temporal_plugin` the one for TensorRT; `aot` compiles them without a GPU.

Spatial attention is not here: it is `scaled_dot_product_attention`.
"""
