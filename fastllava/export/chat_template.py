"""A conversation template as the Jinja that transformers and vLLM render: the very text that training with it writes.

The beginning token is not in it: the tokenizer puts that before every text it is given, so a template with one would give two.
"""

from fastllava.data.templates import Template

# Pictures come before the text of their message, one line each, as training puts them there.
_MACRO = (
    "{%- macro written(content) -%}"
    "{%- set found = namespace(images=0, text='') -%}"
    "{%- if content is string -%}"
    "{%- set found.images = content.split('<image>') | length - 1 -%}"
    "{%- set found.text = content.split('<image>') | join('') -%}"
    "{%- else -%}"
    "{%- for part in content -%}"
    "{%- if part['type'] == 'text' -%}{%- set found.text = found.text + part['text'] -%}"
    "{%- elif part['type'] in ('image', 'image_url') -%}{%- set found.images = found.images + 1 -%}"
    "{%- else -%}{{ raise_exception('a part of type ' + part['type'] + ' cannot be written; give text and image') }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- if found.images -%}{{ (MARK * found.images + (found.text | trim)) | trim }}"
    "{%- else -%}{{ found.text }}{%- endif -%}"
    "{%- endmacro -%}"
)
_SYSTEM = (
    "{%- set given = namespace(system=SYSTEM, rest=messages) -%}"
    "{%- if messages and messages[0]['role'] == 'system' -%}"
    "{%- set given.system = written(messages[0]['content']) -%}{%- set given.rest = messages[1:] -%}"
    "{%- endif -%}"
)
_CHECKS = (
    "{%- if message['role'] not in ('user', 'assistant') -%}"
    "{{ raise_exception('the role ' + message['role'] + ' is unknown here; write user and assistant, and system before them') }}"
    "{%- elif (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('two ' + message['role'] + ' messages in a row, or an answer before a question; training has seen neither') }}"
    "{%- endif -%}"
)


_CONTENT = "written(message['content'])"


def chat_template(form: Template) -> str | None:
    """The template as Jinja, or None for one that has no answers of its own kind to mark (plain, v0).

    A system message replaces the template's own; what training supervises of answers stands between `{% generation %}`
    and `{% endgeneration %}`; roles that training has not seen, or in another order, raise.
    """
    end = _text("<|im_end|>")
    content = f"({_CONTENT} | trim)" if form.trims else _CONTENT
    begin, after = None, ""
    match form.style:
        case "v1":
            opening = _put("given.system", _text(" "))
            ask = _put(_text(f"{form.human}: "), _CONTENT)
            prompt = _put(_text(f" {form.gpt}:"))
            answer = _put(_text(" "), _CONTENT, "eos_token")
        case "mpt":
            opening = _put(_text("<|im_start|>system\n"), "given.system", end)
            ask = _put(_text(f"<|im_start|>{form.human}\n"), _CONTENT, end)
            prompt = _put(_text(f"<|im_start|>{form.gpt}\n"))
            answer = _put(_CONTENT, end)
        case "llama_2":
            opening = ""
            again = _when("loop.index0", _put("bos_token")) if form.begin else ""
            system = _put(_text("<<SYS>>\n"), "given.system", _text("\n<</SYS>>\n\n"))
            system = _when("given.system and not loop.index0", system)
            ask = again + _put(_text("[INST] ")) + system + _put(_CONTENT, _text(" [/INST]"))
            prompt = ""
            answer = _put(_text(" "), _CONTENT, _text(" "), "eos_token")
        case "turns":
            tail = _text(form.end + form.after)
            system = _put(_text(form.head.format(role="system")), "given.system", tail)
            if not form.takes_system:
                system = "{{ raise_exception('training has seen no system message; take it out') }}"
            opening = _when("given.system", system)
            ask = _put(_text(form.head.format(role=form.human)), content, tail)
            head = _text(form.head.format(role=form.gpt))
            prompt = _put(head, _text(form.unthinking)) if form.unthinking else _put(head)
            begin = _put(head) + (_when("loop.last", _put(_text(form.unthinking))) if form.unthinking else "")
            answer, after = _put(content, _text(form.end)), _put(_text(form.after)) if form.after else ""
        case _:
            return None
    begin = prompt if begin is None else begin
    if form.head_learned:
        begin, answer = "", begin + answer
    if form.after_learned:
        answer, after = answer + after, ""
    mark = "<Image><image></Image>\n" if form.mmtag else "<image>\n"
    return (
        _MACRO.replace("MARK", _text(mark))
        + _SYSTEM.replace("SYSTEM", _text(form.system))
        + opening
        + "{%- for message in given.rest -%}"
        + _CHECKS
        + _when("message['role'] == 'user'", ask)
        # Without dashes, as some tools look for these very words.
        + _when("message['role'] == 'assistant'", begin + "{% generation %}" + answer + "{% endgeneration %}" + after)
        + "{%- endfor -%}"
        + _when("add_generation_prompt", prompt)
    )


def _put(*expressions: str) -> str:
    return "{{ " + " + ".join(expressions) + " }}"


def _when(condition: str, then: str) -> str:
    return f"{{%- if {condition} -%}}{then}{{%- endif -%}}"


def _text(text: str) -> str:
    """`text` as a string of Jinja, on one line."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"
