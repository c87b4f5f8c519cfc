"""The prompts that references are built from where none are given: prompts alone, the aligned model answers them.

safety.csv: 118 of AdvBench's harmful behaviours (MIT, see NOTICE); general.csv: 90 ordinary and borderline-benign
questions, and 90 prompts of many other formats, written for this project.
"""

from pathlib import Path

SAFETY = Path(__file__).parent / "safety.csv"
GENERAL = Path(__file__).parent / "general.csv"
