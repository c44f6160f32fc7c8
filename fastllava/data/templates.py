"""The conversation templates: the original's, by its names (llava/conversation.py, conv_templates), and those of newer language models."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from fastllava.errors import UserError

Style = Literal["plain", "v0", "v1", "llama_2", "mpt", "turns"]
"""How turns are written and masked: the original's preprocess_plain, preprocess, preprocess_v1, _llama_2, _mpt (llava/train/train.py);
turns: as the language model itself was taught, of an answer its text and the mark that ends it supervised; LLaVA-NeXT's supervise more."""

_CURIOUS = (
    "A chat between a curious {one} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {one}'s questions."
)
# "language.The" without a space between: so the models that use it were trained.
_MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_LLAVA_LLAMA_2 = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
# The two spaces after "safe." are Llama 2's own.
_LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something not correct. "
    "If you don't know the answer to a question, please don't share false information."
)
_MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
_QWEN_2_5 = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
# FastChat's example for its first Vicuna, which knew no conversations otherwise; a prompt that is to be equal needs every word of it.
_EXAMPLE = (
    "What are the key differences between renewable and non-renewable energy sources?",
    "Renewable energy sources are those that can be replenished naturally in a relatively short amount of time, such as solar, wind, "
    "hydro, geothermal, and biomass. Non-renewable energy sources, on the other hand, are finite and will eventually be depleted, such "
    "as coal, oil, and natural gas. Here are some key differences between renewable and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources are finite and will "
    "eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than non-renewable sources, which can lead "
    "to air and water pollution, greenhouse gas emissions, and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower operational costs than "
    "non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations than non-renewable "
    "sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different situations and needs, while "
    "non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable sources are not, and their "
    "depletion can lead to economic and social instability.\n",
)
_SEPARATORS: dict[Style, frozenset[str]] = {
    "plain": frozenset(),
    "v0": frozenset(),
    "v1": frozenset({"</s>"}),
    "llama_2": frozenset({"</s>"}),
    "mpt": frozenset({"<|im_end|>", "<|im_start|>"}),
    "turns": frozenset(),
}
_MARK = re.compile(r"<[^<>\s]+>")


@dataclass(frozen=True)
class Template:
    """One way to write a conversation as text."""

    name: str
    style: Style
    system: str = ""
    human: str = ""
    """How a question begins."""
    gpt: str = ""
    """How an answer begins."""
    begin: str = ""
    """llama_2 alone: what stands before every round but the first."""
    mmtag: bool = False
    """Write the image as <Image> image </Image>; in training alone."""
    example: tuple[str, str] | None = None
    """A question and its answer that stand before what is asked; in training they do not."""
    head: str = ""
    """turns alone, as are those below: what opens a message of {role}."""
    end: str = ""
    """The mark that ends a message."""
    after: str = ""
    """What stands behind it."""
    unthinking: str = ""
    """What opens the last answer of a conversation, unsupervised: a thought without a word, of a model that thinks."""
    trims: bool = False
    """Messages are written without the blanks at their ends."""
    takes_system: bool = True
    """Whether a message may be the system's."""
    head_learned: bool = False
    """Whether what opens an answer is supervised too."""
    after_learned: bool = False
    """Whether what stands behind the end mark of an answer is supervised too."""
    everywhere: tuple[str, ...] = ()
    """Tokens that are supervised wherever they stand, in questions and in the system text too."""

    @property
    def marks(self) -> tuple[str, ...]:
        """The control tokens that it writes. Styles plain and v0 have none: they separate turns with text, as the original does."""
        match self.style:
            case "mpt":
                return "<|im_start|>", "<|im_end|>"
            case "v1":
                return ("</s>",)
            case "llama_2":
                return (self.begin, "</s>") if self.begin else ("</s>",)
            case "turns":
                roles = [*(["system"] if self.system else []), self.human, self.gpt]
                opened = "".join(self.head.format(role=role) for role in roles) + self.unthinking
                return (*dict.fromkeys(_MARK.findall(opened)), self.end)
        return ()

    @property
    def separators(self) -> frozenset[str]:
        """What the original splits the conversation at, so that a text must not hold it."""
        if self.style == "turns":
            return frozenset(self.marks) - set(_MARK.findall(self.unthinking))
        return _SEPARATORS[self.style]


def _v0(name: str, system: str, mmtag: bool = False, example: tuple[str, str] | None = None) -> Template:
    return Template(name, "v0", system, "Human", "Assistant", mmtag=mmtag, example=example)


def _v1(name: str, system: str, mmtag: bool = False) -> Template:
    return Template(name, "v1", system, "USER", "ASSISTANT", mmtag=mmtag)


def _chatml(name: str, system: str) -> Template:
    return Template(name, "mpt", system, "user", "assistant")


def _turns(name: str, head: str, end: str, after: str = "", gpt: str = "assistant", **more: Any) -> Template:
    return Template(name, "turns", human="user", gpt=gpt, head=head, end=end, after=after, **more)


TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template("plain", "plain"),
        Template("v0_plain", "plain"),
        _v1("v1", _CURIOUS.format(one="user")),
        _v1("vicuna_v1", _CURIOUS.format(one="user")),
        _v1("llava_v1", _CURIOUS.format(one="human")),
        _v1("v1_mmtag", _MMTAG, mmtag=True),
        _v0("default", _CURIOUS.format(one="human"), example=_EXAMPLE),
        _v0("v0", _CURIOUS.format(one="human"), example=_EXAMPLE),
        _v0("llava_v0", _CURIOUS.format(one="human")),
        _v0("v0_mmtag", _MMTAG, mmtag=True),
        Template("llama_2", "llama_2", _LLAMA_2, begin="<s>"),
        Template("llava_llama_2", "llama_2", _LLAVA_LLAMA_2, begin="<s>"),
        Template("mistral_instruct", "llama_2"),
        _chatml("mpt", _MPT),
        _chatml("chatml_direct", "Answer the questions."),
        _chatml("mistral_direct", "Answer the questions."),
        # As the chat templates of these models write them (tokenizer_config.json of Qwen2.5-7B-Instruct, Qwen3-8B,
        # Meta-Llama-3-8B-Instruct, Phi-3-mini-4k-instruct, gemma-7b-it); a system text where they bring one.
        _turns("qwen_2_5", "<|im_start|>{role}\n", "<|im_end|>", "\n", system=_QWEN_2_5),
        _turns("qwen_3", "<|im_start|>{role}\n", "<|im_end|>", "\n", unthinking="<think>\n\n</think>\n\n"),
        _turns("llama_3", "<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", trims=True),
        _turns("phi_3", "<|{role}|>\n", "<|end|>", "\n"),
        _turns("gemma", "<start_of_turn>{role}\n", "<end_of_turn>", "\n", gpt="model", trims=True, takes_system=False),
        # LLaVA-NeXT's, for going on from its checkpoints (its llava/train/train.py: preprocess_qwen, preprocess_llama3, preprocess_gemma).
        # For Llama 3 its list of tokens to supervise everywhere has two line breaks too, which its look-up does not find: the
        # vocabulary spells them otherwise.
        _turns(
            "llava_next_qwen",
            "<|im_start|>{role}\n",
            "<|im_end|>",
            "\n",
            system="You are a helpful assistant.",
            head_learned=True,
            after_learned=True,
            everywhere=("<|im_start|>", "<|im_end|>", "\n"),
        ),
        _turns(
            "llava_next_llama_3",
            "<|start_header_id|>{role}<|end_header_id|>\n\n",
            "<|eot_id|>",
            system=_LLAVA_LLAMA_2,
            trims=True,
            head_learned=True,
            everywhere=("<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        ),
        _turns("llava_next_gemma", "<start_of_turn>{role}\n", "<end_of_turn>", "\n", gpt="model", takes_system=False, after_learned=True),
    )
}


def template(name: str) -> Template:
    """The template called `name`. Raises UserError that lists the names."""
    if name not in TEMPLATES:
        raise UserError(f"data.template: no template '{name}'; write one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
