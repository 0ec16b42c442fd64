// Mouse, fingers, wheel and keys -> movements of the camera and commands.

const TURN_PER_PIXEL = 0.0075; // radians
const KEY_TURN = Math.PI / 36;
const KEY_PAN = 40; // pixels

// touched: called when somebody takes the camera. commands: letter -> what to do.
function listen(canvas, camera, touched, commands) {
  const pointers = new Map();
  const shorterSide = () => Math.min(canvas.clientWidth, canvas.clientHeight);

  canvas.addEventListener("pointerdown", (event) => {
    canvas.focus({ preventScroll: true });
    canvas.setPointerCapture(event.pointerId);
    canvas.classList.add("dragging");
    pointers.set(event.pointerId, [event.clientX, event.clientY]);
    touched();
    event.preventDefault();
  });
  canvas.addEventListener("pointermove", (event) => {
    const last = pointers.get(event.pointerId);
    if (!last) return;
    const before = pinch(pointers);
    pointers.set(event.pointerId, [event.clientX, event.clientY]);
    const after = pinch(pointers);
    const [dx, dy] = [event.clientX - last[0], event.clientY - last[1]];
    if (pointers.size > 1) {
      camera.pan(after.x - before.x, after.y - before.y, shorterSide());
      camera.zoom(before.spread / after.spread);
    } else if (event.buttons & 6 || event.shiftKey || event.ctrlKey || event.metaKey) {
      camera.pan(dx, dy, shorterSide());
    } else {
      camera.turn(-dx * TURN_PER_PIXEL, dy * TURN_PER_PIXEL);
    }
    touched();
  });
  for (const name of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(name, (event) => {
      pointers.delete(event.pointerId);
      if (!pointers.size) canvas.classList.remove("dragging");
    });
  }
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    // Lines and pages as pixels; a pinch on a touchpad comes as a wheel with small steps and Ctrl.
    const pixels = event.deltaY * [1, 16, 400][event.deltaMode] * (event.ctrlKey ? 6 : 1);
    camera.zoom(Math.exp(Math.max(-400, Math.min(400, pixels)) * 0.0015));
    touched();
  }, { passive: false });

  const step = (event, x, y) => {
    if (event.shiftKey) camera.pan(-x * KEY_PAN, -y * KEY_PAN, shorterSide());
    else camera.turn(x * KEY_TURN, -y * KEY_TURN);
    touched();
  };
  const zoom = (factor) => {
    camera.zoom(factor);
    touched();
  };
  window.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    // A focused button takes Space and Enter itself.
    if (event.target instanceof HTMLButtonElement && (event.key === " " || event.key === "Enter")) return;
    const keys = {
      ArrowLeft: () => step(event, -1, 0),
      ArrowRight: () => step(event, 1, 0),
      ArrowUp: () => step(event, 0, -1),
      ArrowDown: () => step(event, 0, 1),
      "+": () => zoom(1 / 1.15),
      "=": () => zoom(1 / 1.15),
      "-": () => zoom(1.15),
      ...commands,
    };
    const action = keys[event.key] ?? keys[event.key.toLowerCase()];
    if (!action) return;
    event.preventDefault();
    action();
  });
}

// Centre and spread of the fingers.
function pinch(pointers) {
  const places = [...pointers.values()];
  const x = places.reduce((sum, place) => sum + place[0], 0) / places.length;
  const y = places.reduce((sum, place) => sum + place[1], 0) / places.length;
  const spread = Math.max(1, Math.hypot(...places.flatMap((place) => [place[0] - x, place[1] - y])));
  return { x, y, spread };
}
