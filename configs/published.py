"""Keys of the published configs that nothing reads, here or in the published programs.

They left the configs of this framework; a published value for them changes nothing.
"""

# The published key -> what it was, and why nothing reads it.
UNREAD = {
    "data.channels": "number of image channels, the same as data.num_channels",
    "training.model": "a label of the network, which model.name decides",
    "training.loss": "training.sde, misspelt",
    "training.continuouse": "training.continuous, misspelt",
    "model.normalization": "layer that normalises; each network has one kind only",
    "model.attention_type": "kind of attention; 'ddpm' is the only one",
    "model.conv_size": "width of the convolutions; 3 is the only one",
    "model.interpolation": "how NCSN and NCSNv2 resize; 'bilinear' is the only way",
    "model.sigma_begin": "largest noise level, which model.sigma_max decides",
    "model.z_max": "the prior's plane, which sampling.z_max decides",
    "model.z_min": "where the ODE ends, which sampling.z_min decides",
    "sampling.vs": "keep the intermediate images, which no sampler did",
}
