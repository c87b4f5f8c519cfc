"""Evidence: does a repair restore safety, and what does it cost? `make evidence`; the tables lie in docs/evidence.

    grid.py      what is tried: customers' adapters (cells) and what is done to each (rows)
    data.py      tasks and prompts
    training.py  the adapters: two aligned ones, and customers with poisoned or clean rows, also such that know us
    subject.py   the language model under test: a base, an update, quick greedy answers
    judges.py    refusal by phrases, refusal by embeddings, incoherence
    rivals.py    cheap rivals and controls that are no methods of the engine
    measure.py   one row on one cell: repair, ask, judge
    run.py       the resumable run
    tables.py    data → Markdown and plots, intervals included

Nothing here is part of the product, and no harmful answer is ever written to the repository: what answers a harmful
prompt is kept as verdicts, one letter a prompt.
"""
