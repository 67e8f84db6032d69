"""The levels of BabyAI that several benchmarks train on, and the settings of their agent."""

LEVELS = 'babyai/GoToRedBallGrey,GoToLocal,PickupLoc,PutNextLocal'
# Flat key → value. Instructions are fused with observations.
SETTINGS = {
    'env.name': LEVELS,
    'model.instruction': True,
    'model.sites': ('instruction',),
    'train.topology': 'threads',
}
