// Ties the parts together. The address holds the view after "#", so that a view can be kept and sent:
// yaw and pitch in degrees, distance and target in world units, background, and spin=0, help=0, ui=0 to turn these off.

const BACKGROUNDS = { grey: [69, 72, 77], black: [0, 0, 0], white: [255, 255, 255] };
const SLOW = 1 / 24; // seconds for a frame; slower machines draw coarser while something moves
const COARSEST = 0.4;
const root = document.documentElement;
const element = (id) => document.getElementById(id);

function fail(error) {
  root.dataset.state = "failed";
  element("message").firstElementChild.textContent = error.message;
}

function start() {
  const scene = JSON.parse(element("scene").textContent);
  const holder = element("splats");
  const splats = unpack(scene, decodeBase64(holder.textContent));
  holder.remove(); // the text is the largest thing in memory
  const canvas = element("view");
  const camera = new Camera(scene);
  let painter = new Painter(canvas, splats);

  let wish = new URLSearchParams(location.hash.slice(1));
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const state = { spin: wish.get("spin") !== "0" && !still, last: 0, asked: false, dirty: true, moved: false, pace: 0, detail: 1, drawn: 1 };

  function readView() {
    const number = (name, fallback) => {
      const value = parseFloat(wish.get(name));
      return Number.isFinite(value) ? value : fallback;
    };
    const { goal } = camera;
    goal.yaw = number("yaw", goal.yaw * 180 / Math.PI) * Math.PI / 180;
    goal.pitch = number("pitch", goal.pitch * 180 / Math.PI) * Math.PI / 180;
    camera.turn(0, 0);
    goal.distance = number("distance", goal.distance);
    camera.zoom(1);
    const target = (wish.get("target") ?? "").split(",").map(parseFloat);
    if (target.length === 3 && target.every(Number.isFinite)) goal.target = target;
    camera.jump();
    if (Object.hasOwn(BACKGROUNDS, wish.get("background"))) root.dataset.background = wish.get("background");
    if (wish.get("help") === "0") root.dataset.help = "off";
    if (wish.get("ui") === "0") root.dataset.ui = "off";
  }

  function writeView() {
    const { yaw, pitch, distance, target } = camera.goal;
    const degrees = (angle) => (angle * 180 / Math.PI).toFixed(2);
    wish.set("yaw", degrees(yaw - 2 * Math.PI * Math.round(yaw / (2 * Math.PI))));
    wish.set("pitch", degrees(pitch));
    wish.set("distance", distance.toPrecision(5));
    wish.set("target", target.map((value) => value.toPrecision(5)).join(","));
    wish.set("background", root.dataset.background);
    wish.set("spin", Number(state.spin));
    keepAddress(`#${wish.toString().replaceAll("%2C", ",")}`);
  }

  function keepAddress(hash) {
    try {
      history.replaceState(null, "", hash);
    } catch {
      // Some frames may not change their address; the view is shown all the same.
    }
  }

  function ask() {
    if (state.asked) return;
    state.asked = true;
    requestAnimationFrame(frame);
  }

  function frame(time) {
    state.asked = false;
    // After a rest the clock begins anew.
    const seconds = state.last ? Math.min(0.1, (time - state.last) / 1000) : 1 / 60;
    if (state.spin) camera.spin(seconds);
    const gliding = still ? (camera.jump(), false) : camera.glide(seconds);
    const moving = state.spin || gliding;
    if (moving && state.last) adapt((time - state.last) / 1000);
    const detail = moving ? state.detail : 1;
    if (moving || state.dirty || detail !== state.drawn) {
      resize(detail);
      painter.draw(camera.view(), BACKGROUNDS[root.dataset.background].map((value) => value / 255), 1e-3 * scene.radius);
      state.drawn = detail;
      state.dirty = false;
      root.dataset.state = "drawn";
    }
    if (moving) {
      state.last = time;
      ask();
    } else {
      state.last = 0;
      if (state.moved) writeView();
      state.moved = false;
    }
  }

  function adapt(seconds) {
    state.pace = 0.8 * state.pace + 0.2 * Math.min(1, seconds);
    if (state.pace > SLOW && state.detail > COARSEST) {
      state.detail = Math.max(COARSEST, 0.8 * state.detail);
      state.pace = SLOW / 2; // the coarser picture has a chance of its own
    }
  }

  function resize(detail) {
    const ratio = detail * Math.min(2, devicePixelRatio);
    const width = Math.max(1, Math.round(canvas.clientWidth * ratio));
    const height = Math.max(1, Math.round(canvas.clientHeight * ratio));
    if (canvas.width !== width) canvas.width = width;
    if (canvas.height !== height) canvas.height = height;
  }

  // A window that moves to another screen may keep its size and get more pixels.
  function watchDensity() {
    matchMedia(`(resolution: ${devicePixelRatio}dppx)`).addEventListener("change", () => {
      redraw();
      watchDensity();
    }, { once: true });
  }

  function redraw() {
    state.dirty = true;
    ask();
  }

  function setSpin(on) {
    state.spin = on;
    element("spin").setAttribute("aria-pressed", String(on));
    state.moved = true;
    redraw();
  }

  const touched = () => {
    if (state.spin) setSpin(false);
    state.moved = true;
    redraw();
  };
  const commands = {
    " ": () => setSpin(!state.spin),
    b: () => {
      const names = Object.keys(BACKGROUNDS);
      root.dataset.background = names[(names.indexOf(root.dataset.background) + 1) % names.length];
      state.moved = true;
      redraw();
    },
    r: () => {
      camera.reset();
      touched();
    },
    h: () => {
      const off = root.dataset.help !== "off";
      root.dataset.help = off ? "off" : "on";
      element("help").setAttribute("aria-pressed", String(!off));
    },
  };
  for (const [id, letter] of [["spin", " "], ["background", "b"], ["reset", "r"], ["help", "h"]]) {
    element(id).addEventListener("click", commands[letter]);
  }

  readView();
  element("spin").setAttribute("aria-pressed", String(state.spin));
  element("help").setAttribute("aria-pressed", String(root.dataset.help !== "off"));
  listen(canvas, camera, touched, commands);
  // Another view of the same page, by a link or by hand, does not load it anew. What the page itself writes is silent.
  window.addEventListener("hashchange", () => {
    wish = new URLSearchParams(location.hash.slice(1));
    camera.reset();
    readView();
    if (state.spin !== (wish.get("spin") !== "0" && !still)) setSpin(!state.spin);
    redraw();
  });
  document.addEventListener("visibilitychange", () => {
    state.last = 0; // time in which nobody looked is no slow frame
  });
  new ResizeObserver(redraw).observe(canvas);
  watchDensity();
  canvas.addEventListener("webglcontextlost", (event) => event.preventDefault());
  canvas.addEventListener("webglcontextrestored", () => {
    try {
      painter = new Painter(canvas, splats);
      redraw();
    } catch (error) {
      fail(error);
    }
  });
  redraw();
}

// One frame later, so that "Unpacking" can be read.
requestAnimationFrame(() => setTimeout(() => {
  try {
    start();
  } catch (error) {
    fail(error);
  }
}));
