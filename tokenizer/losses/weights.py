"""What each loss weighs, and the one place where everything that the paper leaves open is decided (PAPER 2, 10).

The objective is

    0.2 (1.0 L1 + 10 LPIPS + 1e3 Gram + 1.0 CLIP) + 1.0 semantic + 1e-8 KL

with L1 for every modality, LPIPS, Gram and CLIP for images alone, and the semantic term as distillation for images, as
the sigmoid loss for videos and 3D. These weights are the paper's. Not in the paper, and decided here:

LPIPS network: VGG16
    It is the network that LPIPS is used with as a loss; AlexNet is the usual metric, and what is measured should not
    be what was trained on.
Interpolation to 224x224: bilinear, antialiased, the aspect ratio not kept
    Without antialiasing a large image is judged by a few of its pixels, and only these get a gradient. A crop would
    leave the borders without any.
Gram network: VGG16, the five layers that LPIPS reads
    Gram matrices were introduced with VGG features, and LPIPS has computed these already: the term costs no forward
    pass of its own.
Gram normalisation: features of unit length at every place, G = F F^T / (H W), squared Frobenius norm over C
    See `tokenizer.losses.gram` for the figures: of the usual normalisations this is the one with which the published
    weight neither drowns the other terms nor vanishes beside them, and it gives every layer a say.
CLIP network: SigLIP 2 vision where its weights are at hand, else EfficientNet-Lite0
    SigLIP 2 is the teacher that the paper's model is aligned with, so it is loaded already.
CLIP distance: 1 - cosine of the pooled features
    The pooled vector is what text is compared with, and a cosine makes the weight mean the same for every network.
    Places are left to LPIPS.
Distillation scores: cosines times exp(4.8438)
    Of plain cosines, divided by the temperature 2, the softmax would be flat to a few percent: nothing to learn from.
Teacher where there is no image tower for the texts (MiniLM, nano): the image's own text
    Scores of a text with all texts are a teacher that knows which captions mean nearly the same; one-hot targets would
    push them apart.
Distillation direction: for each image a softmax over the texts of the global batch
    It is the formula as printed, and needs nothing but texts from the other processes.
Sigmoid scale and bias: the released 4.8438 and -15.5625, not trained
    The released model holds them as constants (FORMAT 12), and the text tower that they belong to is frozen. With
    another text tower (MiniLM) they must be trained: set `sigmoid_trained`.
KL: summed over channels, averaged over tokens (FORMAT 7)
    The divergence of a token's posterior is that sum; a mean over channels would weigh a channel less in stage 2 than
    in stage 1, where there are 32.
KL of a discrete model: none
    Nothing is sampled there, the log-variances have no effect, and FSQ bounds the means by itself.
Cosine of own text: none, in the published objective
    Distillation and the sigmoid loss compare texts with each other: what all texts have in common is neither asked for
    nor punished. A SigLIP 2 encoder starts in the space of its texts; a small model that starts from nothing learns
    where they are from 1 - cosine of its vector and its own text.
Imitation: none, in the published objective
    A SigLIP 2 encoder brings what it knows of pictures, and 3D is learned from a good many captions. A small model has
    a few hundred captions; what a classifier of photographs sees in a sample says more (`tokenizer.losses.imitation`).
PSNR: none, in the published objective
    Small models add the PSNR itself with a small weight: it counts every item by its relative error, so that rough
    pictures do not drown smooth ones, and its gradient does not fade where L1 is small already.
Rendered Gaussians: L1 + squared error + 0.5 L1 of the coverage
    The paper names L1 alone. The squared error is what PSNR measures, and without the coverage a black object could
    stay transparent before the black ground.

and, beside the losses:

Batches of clips and assets to understand: 1,024 and 512 (`data.batches` of the published stages)
    The upper ends of what the paper gives their reconstruction. The sigmoid loss compares each of them with the texts
    of all, so that a batch has its square of pairs; without a decoder a step costs no more than one of reconstruction.
Where the paper gives a range: the most in a task's first stage, less where its pictures and clips grow
    4,096, 2,048 and 1,024 pictures, 1,024 and 512 clips; assets do not grow, and stay at 512.
Views of an asset that its reconstruction is compared with: 4 (`decode.views` of a source)
    Drawn anew in each epoch from all that its set holds, so that all count in the end. Another asset in the batch says
    more than another view of the same one.
Views that voxels are made from: 16 of 256 x 256 pixels, spread evenly (`atoken shard assets --views`)
    Whatever faces outward lies within 40 degrees of a camera's direction and within 63 of three. Who renders by other
    means gives folders of views of any number. A voxel takes the nearest of them, as in the figure and in the released
    code, or what `tokenizer.assets.packing` says.
Gaussians of a voxel (K): 32, as in the released code (`gaussians.gaussians`)
Key and value cache between tiles: none in training, where the tiles of a clip are as independent as in the released
    code; decoding may have one (`tokenizer.model.context.Tiling`).
What clips gradients, and which weights are not decayed: `tokenizer.training.curriculum.config`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tokenizer.errors import InputError
from tokenizer.losses.lpips import Backbone
from tokenizer.losses.similarity import RELEASED_BIAS, RELEASED_SCALE


@dataclass(frozen=True, kw_only=True, slots=True)
class LossWeights:
    """The published weights (PAPER 2), fixed over all stages; zero leaves a term out.

    reconstruction, semantic, kl: the three parts of the objective.
    l1, psnr, lpips, gram, clip: the terms within the reconstruction; psnr weighs minus the decibels.
    cosine: of the cosine to the own text, beside distillation or the sigmoid loss within the semantic part.
    imitation: of what an image network sees, within the semantic part too; samples that no network has seen have none.

    Raises:
        InputError: a weight that is negative or not finite.
    """

    reconstruction: float = 0.2
    semantic: float = 1.0
    kl: float = 1e-8
    l1: float = 1.0
    psnr: float = 0.0
    lpips: float = 10.0
    gram: float = 1e3
    clip: float = 1.0
    cosine: float = 0.0
    imitation: float = 0.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"the loss weight '{name}' must be a finite number of at least 0, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LossChoices:
    """What the paper leaves open; the module text gives the reasons for the defaults.

    side: pixels of the square that LPIPS, Gram and CLIP look at (the paper's).
    lpips_backbone: the network of LPIPS and Gram.
    clip_network: "siglip2" (needs `siglip2` to be a folder), "lite0", or "auto": SigLIP 2 if a folder is named.
    siglip2: folder of a SigLIP 2 checkpoint.
    temperature: of the distillation, on both sides (the paper's).
    sigmoid_scale / sigmoid_bias: logarithm of the factor on cosines, and what is added.
    sigmoid_trained: whether these two are parameters.
    kl_when_discrete: whether a model with a quantiser keeps the KL term.
    imitated_width: numbers that the imitated network gives of a sample; 1280 is EfficientNet-Lite0.

    Raises:
        InputError: a number out of range, or "siglip2" without a folder.
    """

    side: int = 224
    lpips_backbone: Backbone = "vgg16"
    clip_network: Literal["auto", "siglip2", "lite0"] = "auto"
    siglip2: str | None = None
    temperature: float = 2.0
    sigmoid_scale: float = RELEASED_SCALE
    sigmoid_bias: float = RELEASED_BIAS
    sigmoid_trained: bool = False
    kl_when_discrete: bool = False
    imitated_width: int = 1280

    def __post_init__(self) -> None:
        if self.side < 32:
            raise InputError(f"side must be at least 32 pixels, got {self.side}")
        if not self.temperature > 0:
            raise InputError(f"temperature must be positive, got {self.temperature}")
        if self.imitated_width < 1:
            raise InputError(f"imitated_width must be at least 1, got {self.imitated_width}")
        if self.clip_network == "siglip2" and self.siglip2 is None:
            raise InputError("clip_network is siglip2, but no folder holds its weights; set siglip2=FOLDER")
