"""How it is done: data, adapters, training, evaluation, registry, serving. Nothing here knows Prefect."""
