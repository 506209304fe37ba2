"""What a model is fed, students, and pretrained models."""
