// SPDX-License-Identifier: Apache-2.0
// Boxes drawn on the picture of speakers: a drag over a face, or clicks on two corners of it. What is drawn is typed into
// the field of a box; the fields are what counts, and the picture is drawn anew from them. Runs where the picture is
// made, with `element` around it.

const SLIP = 5; // screen pixels that a hand moves in a click
let corner = null; // the first corner, in pixels of the picture
let pressed = null; // where the pointer went down: x, y on the screen, and the corner there
let chosen = null; // the field of a box where the cursor was last

const speakers = () => document.getElementById("speakers");
const fields = () => [...speakers().querySelectorAll(".box input, .box textarea")];

function target() {
    const all = fields();
    return all.includes(chosen) ? chosen : (all.find((field) => !field.value.trim()) ?? null);
}

function place(svg, event) {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const { width, height } = svg.viewBox.baseVal;
    const inside = (value, most) => Math.round(Math.min(Math.max(value, 0), most));
    return [inside(at.x, width), inside(at.y, height)];
}

const sides = (a, b) => [Math.min(a[0], b[0]), Math.min(a[1], b[1]), Math.max(a[0], b[0]), Math.max(a[1], b[1])];

function sketch(svg, a, b) {
    svg.querySelector(".sketch")?.remove();
    if (!a) return;
    const [x0, y0, x1, y1] = sides(a, b);
    const rect = document.createElementNS(svg.namespaceURI, "rect");
    const values = { class: "sketch", x: x0, y: y0, width: x1 - x0, height: y1 - y0 };
    for (const [name, value] of Object.entries(values)) rect.setAttribute(name, value);
    svg.append(rect);
}

function type(field, words) {
    field.value = words;
    field.dispatchEvent(new Event("input", { bubbles: true }));
}

function finish(svg, a, b) {
    const [x0, y0, x1, y1] = sides(a, b);
    const field = target();
    if (x0 === x1 || y0 === y1 || !field) return;
    corner = chosen = null;
    sketch(svg, null);
    type(field, [x0, y0, x1, y1].join(","));
}

speakers().addEventListener("focusin", (event) => {
    if (fields().includes(event.target)) chosen = event.target;
});

element.addEventListener("pointerdown", (event) => {
    const svg = event.target.closest("svg");
    if (!svg || event.button !== 0) return;
    if (event.pointerType === "mouse") event.preventDefault(); // the browser would drag the picture itself
    svg.setPointerCapture(event.pointerId);
    pressed = { x: event.clientX, y: event.clientY, corner: place(svg, event) };
});

element.addEventListener("pointermove", (event) => {
    const svg = event.target.closest("svg");
    const from = corner ?? pressed?.corner;
    if (svg && from) sketch(svg, from, place(svg, event));
});

element.addEventListener("pointerup", (event) => {
    const svg = event.target.closest("svg");
    if (!svg || !pressed) return;
    const dragged = Math.hypot(event.clientX - pressed.x, event.clientY - pressed.y) > SLIP;
    const from = corner ?? (dragged ? pressed.corner : null);
    pressed = null;
    if (from) finish(svg, from, place(svg, event));
    else corner = place(svg, event);
});

element.addEventListener("dragstart", (event) => event.preventDefault()); // of the picture itself
element.addEventListener("pointercancel", () => (pressed = null)); // a finger that scrolls the page

function escape(event) {
    if (!element.isConnected) document.removeEventListener("keydown", escape); // there is another form
    if (event.key !== "Escape") return;
    corner = pressed = null;
    const svg = element.querySelector("svg");
    if (svg) sketch(svg, null);
}

document.addEventListener("keydown", escape);
