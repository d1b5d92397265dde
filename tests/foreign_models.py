"""Models of other libraries in tiny configurations with random weights, and calls of them.

Each has two calls, where it can of different lengths and with different padding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

with contextlib.suppress(ImportError):
    import transformers  # noqa: F401  (workers are forked from a process that has imported it)

VOCABULARY = 64
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Foreign:
    """A model, and how it is compared.

    Attributes
    ----------
    make
        Makes it, with random weights.
    calls
        Makes arguments of calls.
    options
        Arguments of `GraphChain`.
    quick
        True if it is small and unlike the others.
    """

    make: Callable[[], nn.Module]
    calls: Callable[[], list[Arguments]]
    options: dict[str, Any] = field(default_factory=dict)
    quick: bool = False


# -- inputs ---------------------------------------------------------------------------------------
def tokens(length: int, padded: int, **more: Any) -> dict[str, Any]:
    """Two sequences; `padded` tokens at the end of the second one are padding."""
    ids = torch.randint(3, VOCABULARY, (2, length))
    mask = torch.ones_like(ids)
    mask[1, length - padded :] = 0
    return {"input_ids": ids, "attention_mask": mask, **more}


def text(**more: Any) -> Callable[[], list[Arguments]]:
    return lambda: [((), tokens(12, 4, **more)), ((), tokens(7, 2, **more))]


def labelled_text(**more: Any) -> Callable[[], list[Arguments]]:
    def make() -> list[Arguments]:
        calls = text(**more)()
        for _, given in calls:
            ignored = given["attention_mask"] == 0
            given["labels"] = given["input_ids"].masked_fill(ignored, -100)
        return calls

    return make


def images(size: int = 32, channels: int = 3, name: str | None = None) -> Any:
    def make() -> list[Arguments]:
        found = [torch.randn(count, channels, size, size) for count in (2, 1)]
        return [((x,), {}) if name is None else ((), {name: x}) for x in found]

    return make


# -- of transformers ------------------------------------------------------------------------------
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
TEXT = {**SIZES, "vocab_size": VOCABULARY}
VISION = {**SIZES, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
SEQ2SEQ = {
    **{"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2},
    **{"encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
}
T5 = {
    **{"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2},
    **{"num_heads": 2, "decoder_start_token_id": 0},
}
SPEECH = {
    **{**TEXT, "num_hidden_layers": 2, "conv_dim": (16, 16), "conv_stride": (5, 2)},
    **{"conv_kernel": (10, 3), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16},
    **{"num_conv_pos_embedding_groups": 2, "layerdrop": 0.0, "mask_time_prob": 0.0},
}


def of_transformers(model: str, config: str, **values: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        given = {
            name: getattr(transformers, value.kind)(**value.values) if type(value) is Of else value
            for name, value in values.items()
        }
        found: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**given))
        return found

    return make


class Of:
    """A config within a config."""

    def __init__(self, kind: str, **values: Any) -> None:
        self.kind, self.values = kind, values


def audio() -> list[Arguments]:
    calls = []
    for length, padded in ((800, 200), (600, 90)):
        mask = torch.ones(2, length, dtype=torch.long)
        mask[1, length - padded :] = 0
        calls.append(((), {"input_values": torch.randn(2, length), "attention_mask": mask}))
    return calls


def speech_to_text() -> list[Arguments]:
    sound = [torch.randn(2, 16, 100) for _ in range(2)]
    return [
        ((), {"input_features": sound[0], "labels": torch.randint(3, VOCABULARY, (2, 9))}),
        ((), {"input_features": sound[1], "labels": torch.randint(3, VOCABULARY, (2, 5))}),
    ]


def text_and_images() -> list[Arguments]:
    return [
        ((), {**given, "pixel_values": torch.randn(2, 3, 32, 32), "return_loss": True})
        for _, given in text()()
    ]


def masked_images() -> list[Arguments]:
    mask = torch.ones(2, 32, 32, dtype=torch.long)
    mask[1, :, 20:] = 0
    return [
        ((), {"pixel_values": torch.randn(2, 3, 32, 32), "pixel_mask": mask}),
        ((), {"pixel_values": torch.randn(1, 3, 48, 32)}),
    ]


_HF: dict[str, Foreign] = {
    # decoders, with tied heads and without
    "gpt2": Foreign(
        of_transformers(
            *("GPT2LMHeadModel", "GPT2Config"),
            n_embd=32,
            n_layer=3,
            n_head=2,
            vocab_size=VOCABULARY,
        ),
        labelled_text(),
        quick=True,
    ),
    "llama": Foreign(
        of_transformers("LlamaForCausalLM", "LlamaConfig", **TEXT, num_key_value_heads=1),
        labelled_text(),
    ),
    "gemma": Foreign(
        of_transformers(
            "GemmaForCausalLM", "GemmaConfig", **TEXT, head_dim=16, num_key_value_heads=1
        ),
        text(use_cache=False),
    ),
    "bloom": Foreign(
        of_transformers(
            *("BloomForCausalLM", "BloomConfig"),
            **{"hidden_size": 32, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY},
        ),
        text(),
    ),
    # encoders
    "bert": Foreign(of_transformers("BertForMaskedLM", "BertConfig", **TEXT), labelled_text()),
    "deberta": Foreign(
        of_transformers(
            *("DebertaV2ForTokenClassification", "DebertaV2Config"),
            **{**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        ),
        text(),
    ),
    "xlnet": Foreign(
        of_transformers(
            *("XLNetLMHeadModel", "XLNetConfig"),
            **{"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48},
        ),
        text(),
    ),
    # encoders with decoders
    "t5": Foreign(
        of_transformers("T5ForConditionalGeneration", "T5Config", **T5), labelled_text(), quick=True
    ),
    "bart": Foreign(
        of_transformers(
            *("BartForConditionalGeneration", "BartConfig"),
            **{**SEQ2SEQ, "max_position_embeddings": 64, "pad_token_id": 1},
        ),
        labelled_text(),
    ),
    # vision
    "vit": Foreign(
        of_transformers("ViTForImageClassification", "ViTConfig", **VISION),
        images(name="pixel_values"),
    ),
    "swin": Foreign(
        of_transformers(
            *("SwinForImageClassification", "SwinConfig"),
            **{"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2]},
            **{"num_heads": [2, 2], "window_size": 4},
        ),
        images(name="pixel_values"),
    ),
    "convnext": Foreign(
        of_transformers("ConvNextForImageClassification", "ConvNextConfig", **STAGES),
        images(name="pixel_values"),
    ),
    # two towers
    "clip": Foreign(
        of_transformers(
            *("CLIPModel", "CLIPConfig"),
            text_config={**TEXT, "eos_token_id": 2, "max_position_embeddings": 32},
            vision_config=VISION,
            projection_dim=16,
        ),
        text_and_images,
        quick=True,
    ),
    # audio
    "wav2vec2": Foreign(of_transformers("Wav2Vec2ForCTC", "Wav2Vec2Config", **SPEECH), audio),
    "whisper": Foreign(
        of_transformers(
            *("WhisperForConditionalGeneration", "WhisperConfig"),
            **{**SEQ2SEQ, "num_mel_bins": 16, "max_source_positions": 50},
            **{"max_target_positions": 32, "pad_token_id": 1, "decoder_start_token_id": 2},
        ),
        speech_to_text,
    ),
    # state spaces
    "mamba": Foreign(
        of_transformers(
            *("MambaForCausalLM", "MambaConfig"),
            **{"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCABULARY},
            state_size=4,
        ),
        text(),
    ),
    # mixtures of experts
    "mixtral": Foreign(
        of_transformers(
            "MixtralForCausalLM",
            "MixtralConfig",
            **TEXT,
            num_local_experts=4,
            num_key_value_heads=1,
        ),
        labelled_text(output_router_logits=True),
        # The router's logits leave the middle of a layer: without example inputs this cuts there.
        {"cut": ["model.layers.*.mlp.gate"]},
    ),
    "switch": Foreign(
        of_transformers(
            *("SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig"),
            **{**T5, "num_experts": 4, "router_jitter_noise": 0.0},
        ),
        labelled_text(),
    ),
    # segmentation with several scales, and detection
    "segformer": Foreign(
        of_transformers(
            *("SegformerForSemanticSegmentation", "SegformerConfig"),
            **{"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
            **{"num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 16},
        ),
        images(64, name="pixel_values"),
    ),
    "upernet": Foreign(
        of_transformers(
            *("UperNetForSemanticSegmentation", "UperNetConfig"),
            backbone_config=Of(
                "ConvNextConfig", **STAGES, out_features=["stage1", "stage2", "stage3", "stage4"]
            ),
            **{"hidden_size": 16, "auxiliary_in_channels": 24, "num_labels": 5},
        ),
        lambda: images(64, name="pixel_values")()[:1],  # of one image it normalizes one element
    ),
    "detr": Foreign(
        of_transformers(
            *("DetrForObjectDetection", "DetrConfig"),
            **{"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None},
            backbone_config=Of(
                "ResNetConfig",
                **{"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
                **{"layer_type": "basic", "out_features": ["stage2"]},
            ),
            **{k: v for k, v in SEQ2SEQ.items() if k != "vocab_size"},
            num_queries=5,
        ),
        masked_images,
    ),
}


# -- of pytorchcv ---------------------------------------------------------------------------------
def of_pytorchcv(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        provider = pytest.importorskip("pytorchcv.model_provider")
        found: nn.Module = provider.get_model(name, **options)
        return found

    return make


_CV = {
    "resnet": Foreign(of_pytorchcv("resnet20_cifar10"), images(), quick=True),
    "densenet": Foreign(of_pytorchcv("densenet40_k12_bc_cifar10"), images()),
    "mobilenet": Foreign(of_pytorchcv("mobilenetv2_wd4"), images(224)),
    "unet_cityscapes": Foreign(of_pytorchcv("unet_cityscapes", in_size=(32, 32)), images()),
}


# -- in plain torch -------------------------------------------------------------------------------
class LstmStack(nn.Module):
    """Passes on states from call to call, those of each layer by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.lstms = nn.ModuleList([nn.LSTM(8, 8, batch_first=True) for _ in range(3)])
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, ids: torch.Tensor, states: Any = None) -> Any:
        h, after = self.embedding(ids), []
        for i, lstm in enumerate(self.lstms):
            h, state = lstm(h, None if states is None else states[i])
            after.append(state)
        return self.head(h), after


def with_states() -> list[Arguments]:
    ids = torch.randint(0, VOCABULARY, (2, 12))
    states = [(torch.randn(1, 2, 8), torch.randn(1, 2, 8)) for _ in range(3)]
    return [((ids,), {}), ((ids[:, :7], states), {})]


class UNet(nn.Module):
    """Takes the value of each depth on its way down again on its way up."""

    def __init__(self) -> None:
        super().__init__()
        widths = (4, 8, 16)
        pairs = list(zip((3, *widths[:-1]), widths, strict=True))
        self.down = nn.ModuleList([self._block(a, b) for a, b in pairs])
        self.middle = self._block(16, 16)
        self.up = nn.ModuleList([self._block(16 + 16, 8), self._block(8 + 8, 4), self._block(8, 4)])
        self.head = nn.Conv2d(4, 2, 1)

    @staticmethod
    def _block(before: int, after: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for block in self.up:
            skip = skips.pop()
            x = block(torch.cat([F.interpolate(x, size=skip.shape[-2:]), skip], 1))
        return self.head(x)


class Siamese(nn.Module):
    """Calls one encoder twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 8)
        )
        self.compare = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1))
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> dict[str, torch.Tensor]:
        a, b = self.encoder(left), self.encoder(right)
        score = self.compare(torch.cat([a * b, (a - b).abs()], -1)) * self.scale
        return {"score": score, "distance": F.pairwise_distance(a, b)}


def sequences() -> list[Arguments]:
    calls = []
    for source, target in ((6, 5), (4, 7)):
        padding = torch.zeros(2, source, dtype=torch.bool)
        padding[1, source - 2 :] = True
        masks = {
            "tgt_mask": nn.Transformer.generate_square_subsequent_mask(target).isinf(),
            "src_key_padding_mask": padding,
            "memory_key_padding_mask": padding,
        }
        calls.append(((torch.randn(2, source, 16), torch.randn(2, target, 16)), masks))
    return calls


_PLAIN = {
    "nn_transformer": Foreign(
        lambda: nn.Transformer(16, 2, 2, 2, 32, dropout=0.0, batch_first=True), sequences
    ),
    "lstm": Foreign(LstmStack, with_states, quick=True),
    "unet": Foreign(UNet, images(16), quick=True),
    "siamese": Foreign(
        Siamese,
        lambda: [((torch.randn(n, 6), torch.randn(n, 6)), {}) for n in (5, 3)],
    ),
}

MODELS: dict[str, Foreign] = {**_HF, **_CV, **_PLAIN}


def made(name: str) -> tuple[nn.Module, list[Arguments]]:
    """A model without dropout, and the arguments of calls."""
    torch.manual_seed(0)
    model = MODELS[name].make()
    for module in model.modules():
        for key, value in list(vars(module).items()):
            if isinstance(value, float) and (key == "p" or "drop" in key):
                setattr(module, key, 0.0)
    return model, MODELS[name].calls()
