"""Files on a disk -> shards: `atoken shard images | videos | assets`."""
