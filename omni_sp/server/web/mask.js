// A mask over the first picture: what is painted becomes transparent in it, and is drawn anew.

const PAINT = "#e5007d";
const painter = { picture: null, layer: null, at: [0, 0], is_down: false };

async function openPainter() {
  try {
    painter.picture = await createImageBitmap(state.sources[0]);
  } catch { return showProblem(new Problem("This picture cannot be read.", { param: "image" })); }
  const { width, height } = painter.picture;
  painter.layer = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  painter.layer.lineCap = "round";
  Object.assign($("paint"), { width, height });
  Object.assign(painter, { at: [width / 2, height / 2], is_down: false });
  try {
    if (state.mask) await layMask(state.mask);
  } catch { state.mask = null; }  // of another picture
  $("erase").checked = false;
  $("painter").showModal();
  $("paint").focus();
  drawPainter();
}

// A mask is opaque where the picture stays.
async function layMask(file) {
  const mask = await createImageBitmap(file);
  const { layer } = painter;
  const { width, height } = layer.canvas;
  if (mask.width !== width || mask.height !== height)
    throw new Problem(`The mask is ${mask.width} × ${mask.height}, the picture ${width} × ${height} pixels.`, { param: "mask" });
  fill("source-over");
  layer.globalCompositeOperation = "destination-out";
  layer.drawImage(mask, 0, 0);
}

function fill(how) {
  const { layer } = painter;
  layer.globalCompositeOperation = how;
  layer.fillStyle = PAINT;
  layer.fillRect(0, 0, layer.canvas.width, layer.canvas.height);
}

const brushSize = () => Math.max(1, $("brush").value / 100 * Math.max(painter.picture.width, painter.picture.height));

function paintTo(x, y) {
  const { layer, at } = painter;
  layer.globalCompositeOperation = $("erase").checked ? "destination-out" : "source-over";
  Object.assign(layer, { strokeStyle: PAINT, fillStyle: PAINT, lineWidth: brushSize() });
  layer.beginPath();
  layer.moveTo(...at);
  layer.lineTo(x, y);
  layer.stroke();
  layer.beginPath();
  layer.arc(x, y, brushSize() / 2, 0, 7);  // a line without length would be nothing
  layer.fill();
}

function moveTo(x, y) {
  const { width, height } = painter.picture;
  const to = [Math.min(Math.max(x, 0), width), Math.min(Math.max(y, 0), height)];
  if (painter.is_down) paintTo(...to);
  painter.at = to;
  drawPainter();
}

function drawPainter() {
  const canvas = $("paint"), context = canvas.getContext("2d");
  context.globalAlpha = 1;
  context.drawImage(painter.picture, 0, 0);
  context.globalAlpha = .6;
  context.drawImage(painter.layer.canvas, 0, 0);
  context.globalAlpha = 1;
  // The ring, white on black: to be seen on anything.
  const thin = canvas.width / (canvas.getBoundingClientRect().width || canvas.width);
  for (const [colour, wide] of [["#000", 3], ["#fff", 1.5]]) {
    context.beginPath();
    context.arc(...painter.at, brushSize() / 2, 0, 7);
    Object.assign(context, { strokeStyle: colour, lineWidth: wide * thin });
    context.stroke();
  }
}

function whereIs(event) {
  const box = $("paint").getBoundingClientRect();
  return [(event.clientX - box.x) * $("paint").width / box.width, (event.clientY - box.y) * $("paint").height / box.height];
}

async function takeMask() {
  const { layer } = painter;
  const { width, height } = layer.canvas;
  const mask = new OffscreenCanvas(width, height);
  const context = mask.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  context.globalCompositeOperation = "destination-out";
  context.drawImage(layer.canvas, 0, 0);
  const is_painted = layer.getImageData(0, 0, width, height).data.some((value, place) => place % 4 === 3 && value);
  state.mask = is_painted ? await mask.convertToBlob({ type: "image/png" }) : null;
  $("painter").close();
  showProblem(null);
  showSources();
}

$("mask").onclick = openPainter;
$("mask-remove").onclick = () => { state.mask = null; showSources(); $("mask").focus(); };
$("paint").onpointerdown = (event) => {
  $("paint").setPointerCapture(event.pointerId);
  painter.at = whereIs(event);
  painter.is_down = true;
  moveTo(...painter.at);
};
$("paint").onpointermove = (event) => moveTo(...whereIs(event));
$("paint").onpointerup = $("paint").onpointercancel = () => { painter.is_down = false; };
$("paint").onkeydown = (event) => {
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], " ": [0, 0] }[event.key];
  if (!steps) return;
  event.preventDefault();
  painter.is_down ||= event.key === " ";
  moveTo(...painter.at.map((value, side) => value + steps[side] * brushSize() / 2));
};
$("paint").onkeyup = (event) => { if (event.key === " ") painter.is_down = false; };
$("brush").oninput = drawPainter;
$("paint-all").onclick = () => { fill("source-over"); drawPainter(); };
$("paint-none").onclick = () => { fill("destination-out"); drawPainter(); };
$("mask-file").onchange = async () => {
  const [file] = $("mask-file").files;
  $("mask-file").value = "";
  try {
    if (file) await layMask(file);
    drawPainter();
  } catch (error) {
    $("painter").close();
    showProblem(error instanceof Problem ? error : new Problem("This mask cannot be read.", { param: "mask" }));
  }
};
$("paint-close").onclick = () => $("painter").close();
$("paint-done").onclick = takeMask;
