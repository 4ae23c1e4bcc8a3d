"""In the place of openpi's script of this name, which its packages come without.

The tests run openpi's own where OPENPI_DIR names a clone of it. This one takes the arguments they
use and hands a trained policy of openpi's to openpi's server.
"""

import argparse

from openpi.policies import policy_config
from openpi.serving import websocket_policy_server
from openpi.training import config


def main() -> None:
    """Serve until ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("policy", choices=["policy:checkpoint"])
    parser.add_argument("--policy.config", dest="config", required=True)
    parser.add_argument("--policy.dir", dest="folder", required=True)
    asked = parser.parse_args()
    policy = policy_config.create_trained_policy(config.get_config(asked.config), asked.folder)
    websocket_policy_server.WebsocketPolicyServer(policy, "127.0.0.1", asked.port).serve_forever()


if __name__ == "__main__":
    main()
