"""The fixed sentences of LLaVA's data: what the model is asked in exactly these words.

Sources: the LLaVA-1.5 paper, Table 7, and the records of the released mix as others quote them; for stage 1, Table 11 of the
LLaVA paper.
"""

SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
ONE_SENTENCE = "Provide a one-sentence caption for the provided image."
OCR_TOKENS = "Reference OCR token: "
"""What stands before the words that were read in the picture, which ', ' joins."""

DESCRIBE_REGION = "Please provide a short description for this region: {box}."
LOCATE_PHRASE = "Please provide the bounding box coordinate of the region this sentence describes: {phrase}."

LCS_558K = (
    "Describe the image concisely.",
    "Provide a brief description of the given image.",
    "Offer a succinct explanation of the picture presented.",
    "Summarize the visual content of the image.",
    "Give a short and clear explanation of the subsequent image.",
    "Share a concise interpretation of the image provided.",
    "Present a compact description of the photo's key features.",
    "Relay a brief, clear account of the picture shown.",
    "Render a clear and concise summary of the photo.",
    "Write a terse but informative summary of the picture.",
    "Create a compact narrative representing the image presented.",
)
"""The eleven instructions of stage 1's captions; template plain leaves them out again."""
