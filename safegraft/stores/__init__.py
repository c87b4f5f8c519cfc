"""What is kept: records in SQL (the truth), bytes in a folder (objects), bundles in another (references).

Few verbs, our words; SQLAlchemy and the file system stop at this package's edge. No HTTP, no Celery, no torch.
"""
