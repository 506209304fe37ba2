"""Where teachers run, and what they predict.

Others use `read_teachers`, `Placement`, `StoredSource`, `stream`, `register_teacher`.
"""
