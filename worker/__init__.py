"""The Celery shell: takes a job from the queue, runs the engine on it, records the outcome. No maths, no HTTP."""
