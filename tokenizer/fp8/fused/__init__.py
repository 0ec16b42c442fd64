"""FP8 blocks fused by hand, in Triton: the backend "triton".

What FP8 saves in products it loses again where every layer rounds its inputs, copies them transposed and looks for
their largest value in passes of its own. Here a pass that exists anyway (norm, GELU, QK norm and rotation, each way)
does all of that while it computes, with the scale of the last steps.

Read in this order: `scales` (what is known of each tensor), `kernels`, `norms` and `heads` (the passes), `launch` and
`calls` (how they are called), `products`, and `block`, which takes the place of a `tokenizer.model.transformer.Block`.
"""
