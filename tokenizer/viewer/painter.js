// Draws Gaussians with WebGL 2: sorted back to front, each a quad, blended with premultiplied alpha.
//
// The projection is that of tokenizer/gaussians/projection.py: linearised at the centre (EWA), widened by a filter of
// KERNEL square pixels, dimmed by what the widening would add in light (Mip-Splatting).

const TEXELS = FLOATS / 4;
const ROW = 1024; // Gaussians in a row of the textures
const BATCH = 256; // quads of an instance: instances of one quad keep graphics cards, and drawing in software, waiting
const [SPLATS, ORDER, LAYER] = [0, 1, 2]; // texture units
const BUCKETS = 1 << 16; // of depth; as many as a processor's second cache holds

const VERTEX = `#version 300 es
precision highp float;
precision highp int;

const float KERNEL = 0.1;
const float MARGIN = 0.15;
const float MIN_FILTER = 2.5e-5;

uniform highp sampler2D splats;
uniform highp usampler2D order;
uniform int count;
uniform vec3 eye, right, down, forward;
uniform vec2 size;
uniform float focal, near;
out vec2 offset;
flat out vec4 paint;

void main() {
  gl_Position = vec4(0.0, 0.0, 2.0, 1.0); // outside, unless it turns out to be visible
  int rank = gl_InstanceID * ${BATCH} + gl_VertexID / 4;
  if (rank >= count) return;
  int splat = int(texelFetch(order, ivec2(rank % ${ROW}, rank / ${ROW}), 0).r);
  ivec2 at = ivec2(splat % ${ROW} * ${TEXELS}, splat / ${ROW});
  vec4 p = texelFetch(splats, at, 0);
  vec4 q = texelFetch(splats, at + ivec2(1, 0), 0);
  vec4 r = texelFetch(splats, at + ivec2(2, 0), 0);
  vec4 s = texelFetch(splats, at + ivec2(3, 0), 0);
  mat3 axes = mat3(q.xyz, vec3(q.w, r.xy), vec3(r.zw, s.x));

  vec3 local = p.xyz - eye;
  float depth = dot(local, forward);
  if (depth <= near) return;
  vec2 slopes = vec2(dot(local, right), dot(local, down)) / depth;
  vec2 limit = (0.5 + MARGIN) * size / focal;
  vec2 limited = clamp(slopes, -limit, limit);
  // The picture of the axes has two rows; its determinant is the length of their cross product, which is exact.
  vec3 first = (focal / depth) * ((right - limited.x * forward) * axes);
  vec3 second = (focal / depth) * ((down - limited.y * forward) * axes);
  vec3 normal = cross(first, second);
  float sharp = dot(normal, normal);
  float xx = dot(first, first), xy = dot(first, second), yy = dot(second, second);
  float area = sharp + KERNEL * (xx + yy) + KERNEL * KERNEL;
  float opacity = p.w * sqrt(max(sharp / area, MIN_FILTER));
  if (opacity * 255.0 <= 1.0) return;

  float mean = 0.5 * (xx + yy) + KERNEL;
  float apart = length(vec2(0.5 * (xx - yy), xy));
  float wide = mean + apart;
  // The longer axis, from the row of the matrix that loses no digits; any direction will do for a circle.
  vec2 direction = vec2(1.0, 0.0);
  if (apart > 1e-6 * wide) {
    direction = normalize(xx > yy ? vec2(apart + 0.5 * (xx - yy), xy) : vec2(xy, apart + 0.5 * (yy - xx)));
  }
  vec2 across = vec2(-direction.y, direction.x);
  // Up to where alpha falls to 1/255.
  float reach = sqrt(2.0 * log(opacity * 255.0));
  offset = reach * (vec2(gl_VertexID & 1, gl_VertexID >> 1 & 1) * 2.0 - 1.0);
  vec2 pixel = 0.5 * size + focal * slopes
    + offset.x * sqrt(wide) * direction + offset.y * sqrt(area / wide) * across;
  paint = vec4(s.yzw, opacity);
  gl_Position = vec4((pixel / size * 2.0 - 1.0) * vec2(1.0, -1.0), 0.0, 1.0);
}`;

const FRAGMENT = `#version 300 es
precision highp float;
in vec2 offset;
flat in vec4 paint;
out vec4 colour;

void main() {
  float alpha = min(paint.a * exp(-0.5 * dot(offset, offset)), 0.999);
  if (alpha * 255.0 <= 1.0) discard;
  colour = vec4(paint.rgb * alpha, alpha);
}`;

const WHOLE_VERTEX = `#version 300 es
void main() {
  gl_Position = vec4(vec2(gl_VertexID & 1, gl_VertexID >> 1) * 4.0 - 1.0, 0.0, 1.0);
}`;

const OVER_BACKGROUND = `#version 300 es
precision highp float;
uniform highp sampler2D layer;
uniform vec3 background;
out vec4 colour;

void main() {
  vec4 paint = texelFetch(layer, ivec2(gl_FragCoord.xy), 0);
  colour = vec4(paint.rgb + (1.0 - paint.a) * background, 1.0);
}`;

class Painter {
  constructor(canvas, splats) {
    const gl = canvas.getContext("webgl2", { antialias: false, depth: false, alpha: false });
    if (!gl) {
      throw new Error("This page draws with WebGL 2, which this browser lacks or has turned off. Try a current Chrome, "
        + "Edge, Firefox or Safari, or turn hardware acceleration on in its settings.");
    }
    this.gl = gl;
    this.canvas = canvas;
    this.splats = splats;
    this.rows = Math.ceil(splats.count / ROW);
    this.order = new Uint32Array(this.rows * ROW);
    this.keys = new Uint32Array(splats.count);
    this.counts = new Uint32Array(BUCKETS + 1);
    this.sorted = null; // the direction of view that `order` is for
    this.program = program(gl, VERTEX, FRAGMENT);
    this.uploadSplats();
    gl.activeTexture(gl.TEXTURE0 + ORDER);
    gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
    plainTexture(gl);
    gl.texStorage2D(gl.TEXTURE_2D, 1, gl.R32UI, ROW, this.rows);
    this.makeBatch();
    this.makeLayer();
    gl.disable(gl.DEPTH_TEST);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
  }

  uploadSplats() {
    const { gl, splats, rows } = this;
    const most = gl.getParameter(gl.MAX_TEXTURE_SIZE);
    if (rows > most || ROW * TEXELS > most) {
      throw new Error(`This graphics card holds ${(most * ROW).toLocaleString("en")} Gaussians at most; make the page `
        + "again with a smaller --max-gaussians.");
    }
    gl.activeTexture(gl.TEXTURE0 + SPLATS);
    gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
    plainTexture(gl);
    gl.texStorage2D(gl.TEXTURE_2D, 1, gl.RGBA32F, ROW * TEXELS, rows);
    const whole = Math.floor(splats.count / ROW);
    const put = (row, height, width, values) => {
      gl.texSubImage2D(gl.TEXTURE_2D, 0, 0, row, width * TEXELS, height, gl.RGBA, gl.FLOAT, values);
    };
    if (whole) put(0, whole, ROW, splats.values.subarray(0, whole * ROW * FLOATS));
    if (rows > whole) put(whole, 1, splats.count - whole * ROW, splats.values.subarray(whole * ROW * FLOATS));
  }

  // Two triangles for each quad of an instance; the shader knows the corners by their numbers.
  makeBatch() {
    const { gl } = this;
    this.batch = gl.createVertexArray();
    gl.bindVertexArray(this.batch);
    gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, gl.createBuffer());
    const corners = Uint16Array.from({ length: 6 * BATCH }, (_, i) => 4 * Math.floor(i / 6) + [0, 1, 2, 2, 1, 3][i % 6]);
    gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, corners, gl.STATIC_DRAW);
  }

  // Hundreds of faint layers need more than 8 bits each: they are added up in half floats, where the card can.
  makeLayer() {
    const { gl } = this;
    if (!gl.getExtension("EXT_color_buffer_float") && !gl.getExtension("EXT_color_buffer_half_float")) return;
    this.layer = { frame: gl.createFramebuffer(), texture: null, width: 0, height: 0 };
    this.over = program(gl, WHOLE_VERTEX, OVER_BACKGROUND);
    this.empty = gl.createVertexArray();
  }

  resizeLayer(width, height) {
    const { gl, layer } = this;
    if (layer.width === width && layer.height === height) return;
    gl.activeTexture(gl.TEXTURE0 + LAYER);
    gl.deleteTexture(layer.texture);
    layer.texture = gl.createTexture();
    gl.bindTexture(gl.TEXTURE_2D, layer.texture);
    plainTexture(gl);
    gl.texStorage2D(gl.TEXTURE_2D, 1, gl.RGBA16F, width, height);
    gl.bindFramebuffer(gl.FRAMEBUFFER, layer.frame);
    gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, layer.texture, 0);
    Object.assign(layer, { width, height });
  }

  // Counting sort by depth, the farthest first. Where the camera stands does not matter, only where it looks.
  sort(forward) {
    if (this.sorted && this.sorted.every((value, i) => value === forward[i])) return;
    const { order, keys, counts, splats: { count, means, low, high } } = this;
    const [x, y, z] = forward;
    // The nearest and the farthest corner of the box around the means.
    const reach = (i, near) => forward[i] * (forward[i] > 0 === near ? low[i] : high[i]);
    const first = reach(0, true) + reach(1, true) + reach(2, true);
    const last = reach(0, false) + reach(1, false) + reach(2, false);
    const scale = (BUCKETS - 1) / Math.max(last - first, 1e-30);
    counts.fill(0);
    for (let i = 0, at = 0; i < count; i++, at += 3) {
      const depth = means[at] * x + means[at + 1] * y + means[at + 2] * z;
      // Rounding may lead out of the box by a little.
      const key = Math.max(0, Math.min(BUCKETS - 1, (last - depth) * scale | 0));
      keys[i] = key;
      counts[key + 1]++;
    }
    for (let key = 0; key < BUCKETS; key++) counts[key + 1] += counts[key];
    for (let i = 0; i < count; i++) order[counts[keys[i]]++] = i;
    const { gl } = this;
    gl.activeTexture(gl.TEXTURE0 + ORDER);
    gl.texSubImage2D(gl.TEXTURE_2D, 0, 0, 0, ROW, this.rows, gl.RED_INTEGER, gl.UNSIGNED_INT, order);
    this.sorted = forward;
  }

  // view: right, down, forward, eye. background: red, green, blue in 0..1. near: least depth, in world units.
  draw(view, background, near) {
    const { gl, canvas: { width, height }, layer } = this;
    this.sort(view.forward);
    if (layer) this.resizeLayer(width, height);
    gl.bindFramebuffer(gl.FRAMEBUFFER, layer ? layer.frame : null);
    gl.viewport(0, 0, width, height);
    gl.clearColor(...(layer ? [0, 0, 0] : background), layer ? 0 : 1);
    gl.clear(gl.COLOR_BUFFER_BIT);
    gl.enable(gl.BLEND);
    const { handle, at } = this.program;
    gl.useProgram(handle);
    for (const name of ["eye", "right", "down", "forward"]) gl.uniform3fv(at(name), view[name]);
    gl.uniform2f(at("size"), width, height);
    gl.uniform1f(at("focal"), 0.5 * Math.min(width, height) / Math.tan(FIELD_OF_VIEW / 2));
    gl.uniform1f(at("near"), near);
    gl.uniform1i(at("splats"), SPLATS);
    gl.uniform1i(at("order"), ORDER);
    gl.uniform1i(at("count"), this.splats.count);
    gl.bindVertexArray(this.batch);
    gl.drawElementsInstanced(gl.TRIANGLES, 6 * BATCH, gl.UNSIGNED_SHORT, 0, Math.ceil(this.splats.count / BATCH));
    if (!layer) return;
    gl.bindFramebuffer(gl.FRAMEBUFFER, null);
    gl.disable(gl.BLEND);
    gl.useProgram(this.over.handle);
    gl.uniform1i(this.over.at("layer"), LAYER);
    gl.uniform3fv(this.over.at("background"), background);
    gl.bindVertexArray(this.empty);
    gl.drawArrays(gl.TRIANGLES, 0, 3);
  }
}

function plainTexture(gl) {
  for (const name of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(gl.TEXTURE_2D, name, gl.NEAREST);
  for (const name of [gl.TEXTURE_WRAP_S, gl.TEXTURE_WRAP_T]) gl.texParameteri(gl.TEXTURE_2D, name, gl.CLAMP_TO_EDGE);
}

function program(gl, vertex, fragment) {
  const handle = gl.createProgram();
  for (const [kind, text] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, text);
    gl.compileShader(shader);
    gl.attachShader(handle, shader);
  }
  gl.linkProgram(handle);
  if (!gl.getProgramParameter(handle, gl.LINK_STATUS) && !gl.isContextLost()) {
    const logs = gl.getAttachedShaders(handle).map((shader) => gl.getShaderInfoLog(shader));
    throw new Error(`The graphics driver refused a shader: ${[gl.getProgramInfoLog(handle), ...logs].join(" ").trim()}`);
  }
  const places = new Map();
  const at = (name) => {
    if (!places.has(name)) places.set(name, gl.getUniformLocation(handle, name));
    return places.get(name);
  };
  return { handle, at };
}
