"""Networks by name: one file and one line here for each."""

from nanodlm.model import network
from nanodlm.types import Network

NETWORKS: dict[str, type[Network]] = {'transformer': network.TransformerNetwork}
