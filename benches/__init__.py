"""What fastllava measures about itself: `fastllava bench ...` runs the modules of this folder, which is not packaged.

It is never put on the import path: `kernels` would then mean kernels.py here, and transformers takes a module of that name for
a library of Hugging Face.
"""
