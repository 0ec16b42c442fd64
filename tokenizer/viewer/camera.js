// A camera that circles a target, z up, as tokenizer/cameras.py places them: it looks along "forward", with x right and
// y down. It glides to its goal, so that wheels and keys do not jerk.

const FIELD_OF_VIEW = 40 * Math.PI / 180; // across the shorter side
const GLIDE = 14; // per second: what is left to go shrinks by e^-GLIDE
const TURN = 0.35; // radians per second on the turntable
const HALF_TURN = Math.PI / 2;

class Camera {
  constructor(scene) {
    this.scene = scene;
    this.home = {
      yaw: -Math.PI / 2, // in front, on the -y side
      pitch: 20 * Math.PI / 180,
      distance: scene.radius / Math.sin(FIELD_OF_VIEW / 2),
      target: [...scene.centre],
    };
    this.reset();
    this.jump();
  }

  reset() {
    // The shorter way round.
    const turns = this.now ? Math.round((this.now.yaw - this.home.yaw) / (2 * Math.PI)) : 0;
    this.goal = { ...this.home, target: [...this.home.target], yaw: this.home.yaw + turns * 2 * Math.PI };
  }

  jump() {
    this.now = { ...this.goal, target: [...this.goal.target] };
  }

  turn(yaw, pitch) {
    this.goal.yaw += yaw;
    this.goal.pitch = Math.min(HALF_TURN, Math.max(-HALF_TURN, this.goal.pitch + pitch));
  }

  zoom(factor) {
    const { radius } = this.scene;
    this.goal.distance = Math.min(100 * radius, Math.max(0.02 * radius, this.goal.distance * factor));
  }

  // Moves the scene by pixels of a window whose shorter side has `side`.
  pan(right, down, side) {
    const unit = 2 * this.now.distance * Math.tan(FIELD_OF_VIEW / 2) / side;
    const axes = basis(this.now);
    for (let i = 0; i < 3; i++) this.goal.target[i] -= unit * (right * axes.right[i] + down * axes.down[i]);
  }

  spin(seconds) {
    this.goal.yaw += TURN * seconds;
    this.now.yaw += TURN * seconds;
  }

  // Goes on towards the goal; false when it is there.
  glide(seconds) {
    const { now, goal, scene } = this;
    const share = 1 - Math.exp(-GLIDE * seconds);
    const left = Math.max(
      Math.abs(goal.yaw - now.yaw),
      Math.abs(goal.pitch - now.pitch),
      Math.abs(goal.distance / now.distance - 1),
      ...goal.target.map((value, i) => Math.abs(value - now.target[i]) / scene.radius),
    );
    if (left === 0) return false;
    if (left < 1e-4) {
      this.jump();
      return true;
    }
    now.yaw += share * (goal.yaw - now.yaw);
    now.pitch += share * (goal.pitch - now.pitch);
    now.distance *= (goal.distance / now.distance) ** share;
    for (let i = 0; i < 3; i++) now.target[i] += share * (goal.target[i] - now.target[i]);
    return true;
  }

  view() {
    const axes = basis(this.now);
    const { target, distance } = this.now;
    return { ...axes, eye: target.map((value, i) => value - distance * axes.forward[i]) };
  }
}

function basis({ yaw, pitch }) {
  const [cy, sy, cp, sp] = [Math.cos(yaw), Math.sin(yaw), Math.cos(pitch), Math.sin(pitch)];
  return {
    right: [-sy, cy, 0],
    down: [cy * sp, sy * sp, -cp],
    forward: [-cp * cy, -cp * sy, -sp],
  };
}
