"""The same network in Megatron-Core: tensor, sequence, pipeline and data parallel, and FP8 through Transformer Engine.

Read in this order: `config` (layouts and what they refuse), `engine` (how Megatron is imported), `fp8`, `specs` (one
layer), `packing` and `rows` (what runs through layers and between pipeline stages), `model`, `exchange` (weights of the
native model and back), `checkpoint`, `build`, which joins them, and `cpu`, which lets all of it run without a GPU.
Training has `trained`, `optimizer`, `average` and `training`, an engine of `tokenizer.training.curriculum`; `pretrain`
starts it.

    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    initialise_parallel(config, parallel)                    # after torch.distributed.init_process_group
    model = build_model(config, parallel, native.state_dict())
    output = model(patches)                                  # what ATokenNetwork's encode and decode give

Importing this package loads neither Megatron nor Transformer Engine; `build` does when it is used.
"""
