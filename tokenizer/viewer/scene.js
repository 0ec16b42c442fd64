// The bytes that pack.py wrote -> typed arrays. What is unpacked once is kept for a lost graphics context.

// values, for each Gaussian: means [3], axes [9] (three vectors, each a standard deviation long), colour [3], opacity.
const FLOATS = 16;

function decodeBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const letters = atob(text);
  const bytes = new Uint8Array(letters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = letters.charCodeAt(i);
  return bytes;
}

function unpack(scene, bytes) {
  const count = scene.count;
  let start = bytes.byteOffset;
  const plane = (Type, length) => {
    const values = new Type(bytes.buffer, start, length);
    start += values.byteLength;
    return values;
  };
  const means = plane(Float32Array, 3 * count);
  const rotations = plane(Uint32Array, count);
  const scales = plane(Uint16Array, 3 * count);
  const paint = plane(Uint16Array, 4 * count);

  const [low, high] = scene.scale_range;
  const values = new Float32Array(FLOATS * count);
  const lowest = [Infinity, Infinity, Infinity];
  const highest = [-Infinity, -Infinity, -Infinity];
  const quaternion = [0, 0, 0, 0];
  for (let i = 0; i < count; i++) {
    const at = FLOATS * i;
    unpackRotation(rotations[i], quaternion);
    const [w, x, y, z] = quaternion;
    const a = Math.exp(low + (high - low) * scales[3 * i] / 65535);
    const b = Math.exp(low + (high - low) * scales[3 * i + 1] / 65535);
    const c = Math.exp(low + (high - low) * scales[3 * i + 2] / 65535);
    values.set([
      means[3 * i], means[3 * i + 1], means[3 * i + 2],
      paint[4 * i + 3] / 65535,
      a * (1 - 2 * (y * y + z * z)), a * 2 * (x * y + w * z), a * 2 * (x * z - w * y),
      b * 2 * (x * y - w * z), b * (1 - 2 * (x * x + z * z)), b * 2 * (y * z + w * x),
      c * 2 * (x * z + w * y), c * 2 * (y * z - w * x), c * (1 - 2 * (x * x + y * y)),
      paint[4 * i] / 65535 * scene.peak,
      paint[4 * i + 1] / 65535 * scene.peak,
      paint[4 * i + 2] / 65535 * scene.peak,
    ], at);
    for (let axis = 0; axis < 3; axis++) {
      lowest[axis] = Math.min(lowest[axis], means[3 * i + axis]);
      highest[axis] = Math.max(highest[axis], means[3 * i + axis]);
    }
  }
  return { count, means, values, low: lowest, high: highest };
}

function unpackRotation(bits, quaternion) {
  const largest = bits >>> 30;
  let rest = 1;
  for (let i = 3, shift = 0; i >= 0; i--) {
    if (i === largest) continue;
    const value = (((bits >>> shift) & 1023) / 1023 * 2 - 1) * Math.SQRT1_2;
    quaternion[i] = value;
    rest -= value * value;
    shift += 10;
  }
  quaternion[largest] = Math.sqrt(Math.max(0, rest));
}
