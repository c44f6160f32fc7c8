"""`data.template: auto`: the template that belongs to the model, settled before anything else reads the config."""

from fastllava.config import Config
from fastllava.console.speaker import Say
from fastllava.data.marks import fits
from fastllava.data.templates import TEMPLATES
from fastllava.errors import UserError
from fastllava.model.weights import read_origin
from fastllava.model.weights.configs import FAMILIES, family_of
from fastllava.model.weights.files import read_json
from fastllava.model.weights.write import TEMPLATE_KEY
from fastllava.train.dataset import load_tokenizer

AUTO = "auto"


def with_template(config: Config, say: Say) -> Config:
    """`config` as it is where it names a template; else with the one that belongs to the model, which `say` gets in a line.

    Raises UserError where none of the model's family fits its tokenizer.
    """
    if config.data.template != AUTO:
        return config
    name, reason = _found(config)
    say(f"data.template: auto takes {name}, {reason}")
    return config.model_copy(update={"data": config.data.model_copy(update={"template": name})})


def _found(config: Config) -> tuple[str, str]:
    if config.stage == "pretrain":
        return "plain", "as stage pretrain asks nothing"
    origin, folder = read_origin(config.model), config.model.llm
    if origin.layout != "llm" and (named := read_json(folder / "config.json", "model.llm").get(TEMPLATE_KEY)) in TEMPLATES:
        return str(named), f"which {folder} was trained with"
    family = family_of(origin.text, "model.llm")
    tokenizer = load_tokenizer(config.model.tokenizer or folder, config.data.legacy, "model.tokenizer")
    for name in FAMILIES[family].templates:
        if fits(TEMPLATES[name], tokenizer):
            return name, f"which belongs to a language model of type {family} with the tokens of {tokenizer.where}"
    candidates = " or ".join(FAMILIES[family].templates)
    fitting = ", ".join(name for name, form in TEMPLATES.items() if fits(form, tokenizer))
    raise UserError(
        f"data.template: auto would take {candidates} for a model of type {family}, and {tokenizer.where} has not the tokens for it; "
        f"write one that fits ({fitting})"
    )
