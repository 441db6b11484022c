"""What a model lost: on a text and on tasks, how sure that is, where in the model, and how fast it runs."""
