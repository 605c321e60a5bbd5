"""A tour of RankRouter from Python: battles in memory, training, rankings, one more model, pictures.

`python -m examples.tour` runs it in this project's folder; it can also be pasted into a notebook there. The encoder is
the demo's. A real one is downloaded by its hub id: train_router(battles, "sentence-transformers/all-MiniLM-L6-v2").
"""

import random

import report
from data_loader import Battles
from support.data.demo import demo_folder
from support.routing.new_model import add_from_battles
from train import train_router

# 1. Battles: query, model a, model b, winner. How often a model wins depends on the topic.
topics = ["compute the determinant of matrix {}", "a recipe for lentil soup number {}"]
skill = {"mathematician": (9, 2), "cook": (2, 9), "generalist": (6, 6)}  # by topic
dice, rows = random.Random(0), []
for number in range(600):
    topic, (a, b) = dice.randrange(2), dice.sample(list(skill), 2)
    (winner,) = dice.choices([a, b], [skill[a][topic], skill[b][topic]])
    rows.append((topics[topic].format(number), a, b, winner))

# 2. Train: history and best checkpoint are then in the output folder.
encoder = str(demo_folder() / "encoder")
router = train_router(Battles.from_tuples(rows), encoder, "outputs/tour", epochs=5, num_clusters=4, baselines="all")

# 3. Rank: the best model first, with its score.
for question in ("compute the determinant of my matrix", "a recipe for soup, please"):
    (ranking,) = router.rank([question])
    print(question, "->", ", ".join(f"{name} {score:.2f}" for name, score in ranking))

# 4. Add a model without retraining, from thirty battles: a better cook.
won = [(topics[1].format(-number), "chef", "cook", "chef") for number in range(30)]
add_from_battles(router, "chef", Battles.from_tuples(won))
print("with a chef ->", ", ".join(name for name, _ in router.rank(["a recipe for soup, please"])[0]))

# 5. Plot: learning curves, reliability, baselines, and what each cluster is about, as PNGs in the output folder.
report.main(["outputs/tour", "--plots", "outputs/tour"])
