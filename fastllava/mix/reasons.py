"""Why something of a source is not in the mix: what is wrong with an annotation, and what a rule leaves out."""

BAD: dict[str, str] = {
    "json": "the JSON of the annotation is broken, or a key comes twice in it",
    "columns": "a line of a table has another number of cells than its first line",
    "field": "a field is missing, or is of another type than the format has",
    "answer_missing": "a question without an answer, or an answer without a question",
    "twice": "a second annotation of the same id",
    "box": "a box without area, or outside its picture",
    "no_size": "the width and height of the picture are not known, so a box cannot be placed",
    "no_pairs": "a record without a question and its answer",
    "empty": "a question or an answer without text",
    "image_word": "the text spells <image> where no picture of the record belongs",
    "roles": "turns that do not alternate between human and gpt, human first",
    "not_a_record": "a record that fastllava prepare would refuse as well",
    "max_images": "a list of more pictures than max_images, which is 1 unless it is set",
    "image_path": "the path of an image leads out of the folder of images, or is none",
    "image_missing": "no such file in the folder of images",
}
"""Each annotation dropped for one of these is named in dropped.jsonl; `max_bad_share` bounds their share."""

BY_RULE: dict[str, str] = {
    "other_split": "not of the split that is asked for",
    "sample": "not among the records that were sampled",
    "per_image": "not among the annotations of an image that were sampled",
    "one_caption": "another caption of the same image was taken",
    "balance": "captions of frequent concepts that were not sampled, or of rare ones alone",
    "sharegpt_short": "fewer than two turns, or fewer than 16 characters",
    "sharegpt_roles": "turns that do not alternate",
    "sharegpt_blocked": "a blocked word, or a blocked answer",
    "sharegpt_html": "HTML that cannot be read",
    "sharegpt_duplicate": "an id, or a first question with its answer, seen before",
    "sharegpt_plugins": "a conversation with plug-ins",
    "sharegpt_numbering": "a list whose numbers repeat",
    "sharegpt_digits": "one digit nine times in a row",
    "too_long": "longer than max_tokens, and nothing is left of it",
}
"""What rules leave out is counted, not named."""

REASONS = BAD | BY_RULE
