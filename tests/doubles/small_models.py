"""Models of transformers with a config of few and small layers."""

import transformers


def small_model(name: str, **config: object) -> transformers.PreTrainedModel:
    """Create a model by the name of its class, with random weights."""
    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(**config))
