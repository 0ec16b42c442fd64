"""The full training of AToken: every loss of the paper, four stages, any number of processes (PAPER 2 to 4).

    python -m tokenizer.training.curriculum --config configs/tokenizer/stages/stage1-image.yaml key=value ...

Read in this order: `config` (a run is a YAML file), `model` (what is trained), `start` and `stages` (where a stage
begins), `preparation` (batches to what an engine needs) and `objective` (what an engine minimises), `engine` (the
protocol between loop and engine) and `torch_engine`, `loop`, `checkpoint`, `records` (logs), `validation`.
"""
