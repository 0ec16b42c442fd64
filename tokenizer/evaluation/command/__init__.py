"""`atoken evaluate`: any tokenizer on any data set, every metric, and a report that says exactly what was measured.

datasets, samples   what is measured on: files, shards or packaged pictures -> frames, as a preset wants them
presets             protocols of the paper by name
systems             what is measured: AToken models, and anything through an adapter of three methods
baselines           JPEG, WebP, x264, the linear code, flat voxels; diffusers_codec: autoencoders of diffusers
understanding       zero-shot classification and retrieval, of models that are aligned with text
measurement         everything that is counted, and its state in a file
runner              the loop: resumable, over any number of processes
results, markdown, html, plots, examples    what is written
"""
