"""One module per family, named as the `model_type` of its `config.json`; `ryot.models.registry` finds them by that."""
