"""How good generated images are: metrics, and runs over lists of sampling configurations with intervals and plots.

`run.evaluate` samples and measures, `plots.save_plots` draws what it found, `metrics` are plain functions of features,
images and tokens, `exact` compares samplers with a model whose distribution is known. Needs the extra `evaluate`.
"""
