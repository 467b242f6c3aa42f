"""The proving ground: when does GAD beat plain SFT, by how much, and what makes it?

One folder an experiment: `experiment.toml` asks the question and names the arms, `recipe.toml` is the recipe
of its main run, `README.md` tells set-up, result and verdict, `results.json` holds every figure by seed.

    python -m experiments                       lists them
    python -m experiments NAME --seeds 5        runs what is missing, and writes results and page
"""
