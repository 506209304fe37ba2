"""Where teachers run, and what they answer.

Others use `read_teachers`, `Placement`, `StoredSource`, `stream`, `register_teacher`.
"""
