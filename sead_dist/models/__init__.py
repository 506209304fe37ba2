"""What a model is fed, students, and pretrained models.

Others use `ModelInputs`, `build_student`, `load_classifier`.
"""
