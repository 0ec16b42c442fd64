"""What training minimises: how far reconstructions are from originals, posteriors from noise, images from their texts.

One module for each loss, with its formula, range and source; `weights` holds what they weigh and every choice that the
paper leaves open, with the reason for it.

A loss gives one value for each unit that it is averaged over (a patch, a picture, a token, an image of the batch) and
leaves the mean to the caller, who alone knows how many units a step has over all its processes and accumulations.
"""
