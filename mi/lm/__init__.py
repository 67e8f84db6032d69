"""Language models: data, model, loss, evaluation, training."""
