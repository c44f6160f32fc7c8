"""What a config.json says, in our terms: the decoder. Refuses what is not supported."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastllava.errors import UserError
from fastllava.model.decoders import DecoderConfig
from fastllava.model.fields import positive as _positive
from fastllava.model.llama import Llama3Rope, LlamaConfig
from fastllava.model.mpt import MptConfig

# What transformers fills in where a config.json is silent (its LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config).
_SHARED = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}


@dataclass(frozen=True)
class Family:
    """A kind of decoder, named by the model_type of its config.json."""

    defaults: Mapping[str, Any]
    """What transformers fills in where a config.json is silent."""
    llava: str
    """The model_type of a whole LLaVA of it in the original's layout, as the original and its successors spell it."""
    architecture: str
    """Its class there."""
    templates: tuple[str, ...]
    """The conversation templates of such models; `data.template: auto` takes the first that fits the tokenizer."""
    also: tuple[str, ...] = ()
    """Other names of it that files have."""


FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        {**_SHARED, "vocab_size": 32000, "intermediate_size": 11008, "num_key_value_heads": None},
        "llava_llama",
        "LlavaLlamaForCausalLM",
        ("llama_3", "v1"),
        also=("llava",),
    ),
    "mistral": Family(
        {**_SHARED, "vocab_size": 32000, "intermediate_size": 14336, "num_key_value_heads": 8, "sliding_window": 4096},
        "llava_mistral",
        "LlavaMistralForCausalLM",
        ("mistral_instruct",),
    ),
    "qwen2": Family(
        {**_SHARED, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32},
        "llava_qwen",
        "LlavaQwenForCausalLM",
        ("qwen_2_5",),
        # Runs of the first versions of this project wrote this.
        also=("llava_qwen2",),
    ),
    "qwen3": Family(
        {**_SHARED, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "head_dim": 128},
        "llava_qwen3",
        "LlavaQwen3ForCausalLM",
        ("qwen_3",),
    ),
    # Its defaults are in MptConfig.
    "mpt": Family({}, "llava_mpt", "LlavaMptForCausalLM", ("mpt",)),
}
_FAMILY_OF = {name: family for family, it in FAMILIES.items() for name in (family, it.llava, *it.also)}


def family_of(config: Mapping[str, Any], where: str) -> str:
    """The decoder family, such as "llama" or "qwen3", of a config.json's model_type (the original LLaVA's names included)."""
    model_type = str(config.get("model_type", "llama"))
    family = _FAMILY_OF.get(model_type)
    if family is None:
        raise UserError(
            f"{where}: model_type {model_type!r} is not supported; give a model of type {', '.join(FAMILIES)}, or a LLaVA checkpoint of one"
        )
    return family


def decoder_config(config: Mapping[str, Any], where: str) -> DecoderConfig:
    """The decoder of any family that `config` describes. `where` begins every error."""
    return MptConfig.read(config, where) if family_of(config, where) == "mpt" else llama_config(config, where)


def llama_config(config: Mapping[str, Any], where: str) -> LlamaConfig:
    """The decoder with Llama's layers that `config` describes. `where` begins every error."""
    family = family_of(config, where)
    given = {**FAMILIES[family].defaults, **{name: value for name, value in config.items() if value is not None}}
    whole = lambda name: _positive(given, name, where, int)  # noqa: E731
    if given.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UserError(f"{where}: hidden_act {given['hidden_act']!r} is not supported; the decoder needs silu")
    if given.get("attention_dropout"):
        raise UserError(f"{where}: attention_dropout {given['attention_dropout']} is not supported; write 0.0")
    if given.get("quantization_config"):
        raise UserError(f"{where}: its weights are quantised; give the model in fp16, bf16 or fp32")
    heads, width = whole("num_attention_heads"), whole("hidden_size")
    if given["num_key_value_heads"] is None:
        given["num_key_value_heads"] = heads
    if heads % whole("num_key_value_heads"):
        raise UserError(f"{where}: num_key_value_heads {given['num_key_value_heads']} does not divide num_attention_heads {heads}")
    if "head_dim" not in given and width % heads:
        raise UserError(f"{where}: num_attention_heads {heads} does not divide hidden_size {width}, and there is no head_dim")
    given.setdefault("head_dim", width // heads)
    if whole("head_dim") % 2:
        raise UserError(
            f"{where}: head_dim {given['head_dim']} is odd, and rotary positions turn pairs of columns; give a model whose head_dim "
            "(hidden_size / num_attention_heads where it is not written) is even"
        )
    theta, scaling = _rope(given, where)
    window = given.get("sliding_window") if family == "mistral" or given.get("use_sliding_window") else None
    if family == "mistral" and "sliding_window" in config and config["sliding_window"] is None:
        window = None
    return LlamaConfig(
        vocab_size=whole("vocab_size"),
        hidden_size=width,
        intermediate_size=whole("intermediate_size"),
        num_hidden_layers=whole("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=given["num_key_value_heads"],
        head_dim=whole("head_dim"),
        rms_norm_eps=_positive(given, "rms_norm_eps", where, float),
        rope_theta=theta,
        rope_scaling=scaling,
        qk_norm=family == "qwen3",
        qkv_bias=family == "qwen2" or bool(given.get("attention_bias")),
        output_bias=family in ("llama", "qwen3") and bool(given.get("attention_bias")),
        mlp_bias=bool(given.get("mlp_bias")),
        tied=bool(given.get("tie_word_embeddings")),
        window=window,
    )


def text_rows(config: Mapping[str, Any], rows: int) -> int:
    """How many of the `rows` of embedding and head hold text, by the config.json of a llava-hf checkpoint.

    The others are the image's, the pad token's and padding to a multiple of 64: no text gets their ids, and a loss over them
    would be another one than the LLM's own. This project's exports say the number; in others, what begins with the image is padding.
    """
    said, image = config.get("unpadded_vocab_size"), image_token(config)
    if isinstance(said, int) and 0 < said <= rows:
        return said
    return image if rows % 64 == 0 and 0 < rows - image <= 64 else rows


def image_token(config: Mapping[str, Any]) -> int:
    """The image's id, by the config.json of a llava-hf checkpoint."""
    found = config.get("image_token_index", config.get("image_token_id"))
    return found if isinstance(found, int) else 32000


def _rope(given: Mapping[str, Any], where: str) -> tuple[float, float | Llama3Rope | None]:
    # transformers 5 writes rope_parameters, which holds rope_theta too; 4 writes rope_scaling beside rope_theta.
    parameters = given.get("rope_parameters") or given.get("rope_scaling") or {}
    theta = _positive({"rope_theta": parameters.get("rope_theta", given["rope_theta"])}, "rope_theta", where, float)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    number = lambda name: _positive(parameters, name, f"{where}: rope scaling", float)  # noqa: E731
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, number("factor")
    if kind == "llama3":
        original = _positive(parameters, "original_max_position_embeddings", f"{where}: rope scaling", int)
        return theta, Llama3Rope(number("factor"), number("low_freq_factor"), number("high_freq_factor"), original)
    raise UserError(f"{where}: rope scaling {kind!r} is not supported; a model with none, linear or llama3 is")
