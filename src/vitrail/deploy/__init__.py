"""From a trained model to what ships: export, INT8, the tournament of runtimes, prediction without torch.

Nothing is imported here: ``vitrail.deploy.runtime`` must stay free of torch.
"""
