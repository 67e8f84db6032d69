"""Language models: data, model, loss, training, evaluation and sampling."""
