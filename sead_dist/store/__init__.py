"""The prediction store: kept predictions of teachers.

Others use `StoreFolder`, `TeacherKey`.
"""
