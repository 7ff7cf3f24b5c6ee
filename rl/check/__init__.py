"""Is an algorithm right? Proofs that hold for every algorithm, on a toy that trains in seconds.

`toy.py` is the toy, `variants.py` the built-in algorithms with settings for it, `checks.py` the proofs, `page.py` runs them.
"""
