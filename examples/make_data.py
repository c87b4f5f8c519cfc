"""Draws examples/data/reviews_{train,eval}.csv from a published data set.

Source: the "amazonReviewSnippets" ground truth that ships with vaderSentiment (C.J. Hutto and
Eric Gilbert, ICWSM 2014; MIT, see examples/data/NOTICE). Each row there is one sentence of a product
review with the mean of twenty human ratings from -4 to +4. Kept are sentences of 25 to 160
characters with a clear rating (|mean| >= 1.2), balanced, in a seeded order.

    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2
    tar xzf vaderSentiment-3.3.2.tar.gz
    tar xzf vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz
    python examples/make_data.py hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt
"""

import csv
import random
import sys
from pathlib import Path

DATA = Path(__file__).parent / "data"
TRAIN_PER_LABEL, EVAL_PER_LABEL, SEED = 200, 100, 20


def main(source: Path) -> None:
    by_label: dict[str, list[str]] = {"positive": [], "negative": []}
    for line in source.read_text(encoding="utf-8").splitlines():
        _, rating, text = line.split("\t")
        text = text.strip()
        if abs(float(rating)) >= 1.2 and 25 <= len(text) <= 160:
            by_label["positive" if float(rating) > 0 else "negative"].append(text)
    rng = random.Random(SEED)
    train, held_out = [], []
    for label, texts in by_label.items():
        unique = sorted(set(texts))
        rng.shuffle(unique)
        train += [(text, label) for text in unique[:TRAIN_PER_LABEL]]
        held_out += [(text, label) for text in unique[TRAIN_PER_LABEL:][:EVAL_PER_LABEL]]
    for name, rows in (("train", train), ("eval", held_out)):
        rng.shuffle(rows)
        with (DATA / f"reviews_{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["text", "label"])
            writer.writerows(rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
