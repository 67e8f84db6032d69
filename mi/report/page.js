'use strict';
// Sorts the tables and draws the figures from the numbers in the page; nothing is fetched. Words of
// runs become text nodes and never markup.

const DATA = JSON.parse(document.getElementById('data').textContent);
const ARMS = DATA.arms;
const shown = new Set(ARMS.keys());
const redraws = [];

// ---------------------------------------------------------------------------------------- elements

function html(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS('http://www.w3.org/2000/svg', name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** A row of buttons of which one is pressed; act(word) when another one is. */
function choice(name, words, act) {
  const box = html('span', {class: 'switch', role: 'group', 'aria-label': name});
  for (const [i, word] of words.entries()) {
    const button = html('button', {type: 'button', 'aria-pressed': i === 0}, word);
    button.addEventListener('click', () => {
      for (const other of box.children) other.setAttribute('aria-pressed', other === button);
      act(word);
    });
    box.append(button);
  }
  return box;
}

// ---------------------------------------------------------------------------------------- sorting

const NEXT = {none: 'ascending', ascending: 'descending', descending: 'none'};

function sortable(table) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  for (const [column, head] of heads.entries()) {
    const button = html('button', {type: 'button'}, ...head.childNodes);
    head.append(button);
    head.setAttribute('aria-sort', 'none');
    button.addEventListener('click', () => {
      const how = NEXT[head.getAttribute('aria-sort')];
      for (const other of heads) other.setAttribute('aria-sort', 'none');
      head.setAttribute('aria-sort', how);
      body.append(...(how === 'none' ? rows : ordered(rows, column, how === 'ascending' ? 1 : -1)));
    });
  }
}

/** By the number in data-value where there is one, else by the words; what is empty comes last. */
function ordered(rows, column, sign) {
  const key = ({cells: {[column]: cell}}) => cell.dataset.value ?? cell.textContent.replace(/^—$/, '');
  const numbers = rows.some(row => row.cells[column].dataset.value !== undefined);
  return rows.toSorted((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === '' || y === '') return (x === '') - (y === '');
    return sign * (numbers ? x - y : x.localeCompare(y, undefined, {numeric: true}));
  });
}

// ---------------------------------------------------------------------------------------- scales

/** About `count` round numbers in [low, high], whole ones if `whole`, and how each is written. */
function ticks(low, high, count, whole = false) {
  const rough = (high - low || Math.abs(high) || 1) / count, power = 10 ** Math.floor(Math.log10(rough));
  const round = power * [1, 2, 2.5, 5, 10].find(x => x * power >= rough * 0.999);
  const step = whole ? Math.max(1, Math.ceil(round - 1e-9)) : round;
  const values = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) values.push(i * step);
  return {values, words: written(values)};
}

/** Powers of ten in [low, high], both above 0, with 2 and 5 between them where there is space. */
function decades(low, high, count) {
  const first = Math.floor(Math.log10(low) + 1e-9), last = Math.floor(Math.log10(high) + 1e-9);
  const every = Math.max(1, Math.ceil((last - first + 1) / count)), values = [];
  const between = 3 * (last - first) <= 2 * count ? [1, 2, 5] : [1];
  for (let p = first; p <= last; p += every) {
    values.push(...between.map(x => x * 10 ** p).filter(v => v >= low * 0.999 && v <= high * 1.001));
  }
  return {values, words: values.map(v => written([v])[0])};
}

/** Numbers with one unit, in as many digits as tell them apart: 429.5k, 430.0k. */
function written(values) {
  const sizes = values.filter(v => v !== 0).map(Math.abs);
  if (!sizes.length) return values.map(String);
  const units = [[1e12, 'T'], [1e9, 'G'], [1e6, 'M'], [1e3, 'k']];
  const plain = values.length > 1 && Math.max(...sizes) < 1e4;
  const [scale, unit] = plain ? [1, ''] : units.find(([size]) => Math.min(...sizes) >= size * 0.999) ?? [1, ''];
  const scaled = values.map(v => v / scale), sorted = scaled.toSorted((a, b) => a - b);
  const gaps = sorted.slice(1).map((v, i) => v - sorted[i]).filter(gap => gap > 0);
  const allowed = gaps.length ? Math.min(...gaps) * 1e-3 : Math.max(...scaled.map(Math.abs)) * 5e-3;
  let places = 0;
  while (places < 15 && scaled.some(v => Math.abs(v - Number(v.toFixed(places))) > allowed)) places++;
  return scaled.map(v => v === 0 ? '0' : minus(v.toFixed(places)) + unit);
}

function minus(text) {
  return text.replace('-', '−');
}

function digits(low, high) {
  return Math.min(6, Math.max(0, 2 - Math.floor(Math.log10(high - low || Math.abs(high) || 1))));
}

/** A frame with axes: x and y map numbers to pixels, `inside` is clipped to it. */
function frame(box, width, height, of) {
  const {left = 52, right = 10, top = 10, bottom = 40} = of;
  const [x0, x1, y0, y1] = [left, width - right, height - bottom, top];
  const map = (lo, hi, a, b, f = v => v) => v => a + (b - a) * (f(v) - f(lo)) / (f(hi) - f(lo) || 1);
  const x = map(of.x[0], of.x[1], x0, x1, of.log ? Math.log : undefined);
  const y = of.y ? map(of.y[0], of.y[1], y0, y1) : null;
  const root = svg('svg', {viewBox: `0 0 ${width} ${height}`, 'aria-hidden': true});
  const count = Math.max(2, Math.floor((x1 - x0) / 75));
  const along = of.log ? decades(...of.x, count) : ticks(...of.x, count, of.whole);
  for (const [i, v] of along.values.entries()) {
    root.append(svg('line', {class: 'grid', x1: x(v), x2: x(v), y1: y0, y2: of.y ? y0 + 4 : y1}));
    root.append(svg('text', {x: x(v), y: y0 + 17, 'text-anchor': 'middle'}, along.words[i]));
  }
  root.append(svg('line', {class: 'axis', x1: x0, x2: x1, y1: y0, y2: y0}));
  root.append(svg('text', {x: (x0 + x1) / 2, y: y0 + 35, 'text-anchor': 'middle'}, of.xlabel));
  if (of.y) {
    const up = ticks(...of.y, Math.max(2, Math.floor((y0 - y1) / 42)));
    for (const [i, v] of up.values.entries()) {
      root.append(svg('line', {class: 'grid', x1: x0, x2: x1, y1: y(v), y2: y(v)}));
      root.append(svg('text', {x: x0 - 7, y: y(v) + 4, 'text-anchor': 'end'}, up.words[i]));
    }
  }
  const id = `${box.id}-clip`;
  root.append(svg('clipPath', {id}, svg('rect', {x: x0, y: y1 - 2, width: Math.max(0, x1 - x0 + 4), height: y0 - y1 + 3})));
  const inside = svg('g', {'clip-path': `url(#${id})`});
  root.append(inside);
  return {root, inside, x, y, x0, x1, y0, y1};
}

/** Calls draw(box, width) now, when the width changes, and when other arms are shown. */
function chart(id, draw) {
  const box = document.getElementById(id);
  if (!box) return;
  let width = 0;
  const redraw = () => { if (width > 0) box.replaceChildren(...draw(box, width)); };
  redraws.push(redraw);
  new ResizeObserver(([entry]) => {
    const now = Math.round(entry.contentRect.width);
    if (now !== width) { width = now; redraw(); }
  }).observe(box);
}

/** A piece of an arm's line, for legends. */
function swatch(arm) {
  const line = svg('line', {x1: 0, x2: 24, y1: 5, y2: 5, stroke: arm.colour, 'stroke-width': 2.5, 'stroke-dasharray': arm.dash});
  return svg('svg', {class: 'swatch', viewBox: '0 0 24 10', 'aria-hidden': true}, line);
}

function some() {
  return [...shown].sort((a, b) => a - b).map(i => ARMS[i]);
}

function nothing(text) {
  return [html('p', {class: 'soft'}, text)];
}

function extent(values, margin) {
  const low = Math.min(...values), high = Math.max(...values);
  // Numbers that differ by rounding alone are equal: no step between them is one of their type.
  const spread = high - low > 1e-9 * Math.max(Math.abs(low), Math.abs(high)) ? high - low : 0;
  const by = margin * spread || 0.05 * Math.abs(high) || 1;
  return [low - by, high + by];
}

// ---------------------------------------------------------------------------------------- figures

const curves = {over: 'steps', range: 'later half'};

function drawCurves(box, width) {
  const xs = arm => curves.over === 'steps' ? arm.curve.steps : arm.curve.seconds;
  const arms = some().filter(arm => arm.curve && xs(arm));
  if (!arms.length) return nothing('No curve to show.');
  const last = Math.max(...arms.map(arm => xs(arm).at(-1)));
  const half = curves.range === 'all' ? 0 : last / 2, ys = [];
  for (const arm of arms) {
    const {mean, low, high} = arm.curve;
    mean.forEach((v, i) => { if (xs(arm)[i] >= half) ys.push(v, low?.[i] ?? v, high?.[i] ?? v); });
  }
  const f = frame(box, width, Math.min(440, Math.max(260, width * 0.42)), {
    x: [0, last || 1], y: extent(ys, 0.06), whole: curves.over === 'steps',
    xlabel: `training ${curves.over}`,
  });
  for (const arm of arms) {
    const {mean, low, high} = arm.curve, points = (of, order) => order.map(i => `${f.x(xs(arm)[i]).toFixed(1)},${f.y(of[i]).toFixed(1)}`);
    const forth = [...mean.keys()], back = forth.toReversed();
    const group = svg('g', {'data-arm': arm.label});
    if (low) group.append(svg('polygon', {class: 'band', fill: arm.colour, points: [...points(high, forth), ...points(low, back)].join(' ')}));
    group.append(svg('polyline', {class: 'line', stroke: arm.colour, 'stroke-dasharray': arm.dash, points: points(mean, forth).join(' ')}));
    if (mean.length === 1) group.append(svg('circle', {cx: f.x(xs(arm)[0]), cy: f.y(mean[0]), r: 3, fill: arm.colour}));
    f.inside.append(group);
  }
  const cursor = svg('line', {class: 'grid', y1: f.y0, y2: f.y1, visibility: 'hidden'});
  const readout = html('div', {class: 'readout', hidden: ''});
  f.root.append(cursor);
  f.root.addEventListener('pointermove', event => {
    const scale = width / f.root.getBoundingClientRect().width;
    const at = (event.offsetX * scale - f.x0) / (f.x1 - f.x0) * last;
    read(arms, xs, Math.min(last, Math.max(0, at)), f, cursor, readout, width);
  });
  f.root.addEventListener('pointerleave', () => {
    readout.hidden = true;
    cursor.setAttribute('visibility', 'hidden');
  });
  return [f.root, readout];
}

/** What each curve is at its point nearest to x, the highest first, in a box beside the cursor. */
function read(arms, xs, x, f, cursor, readout, width) {
  const nearest = arm => xs(arm).reduce((best, v, i, all) => Math.abs(v - x) < Math.abs(all[best] - x) ? i : best, 0);
  const here = arms.map(arm => ({arm, i: nearest(arm)})).toSorted((a, b) => b.arm.curve.mean[b.i] - a.arm.curve.mean[a.i]);
  const values = here.map(({arm, i}) => arm.curve.mean[i]);
  const places = Math.max(2, digits(Math.min(...values), Math.max(...values)));
  const word = v => minus(v.toFixed(Math.min(places, 4)));
  const lines = here.map(({arm, i}) => {
    const {mean, low, high} = arm.curve;
    const interval = low ? ` [${word(low[i])}, ${word(high[i])}]` : '';
    return html('div', {}, swatch(arm), `${word(mean[i])}${interval} ${arm.label}`);
  });
  const at = f.x(xs(here[0].arm)[here[0].i]);
  const title = `${curves.over === 'steps' ? 'step' : 'second'} ${xs(here[0].arm)[here[0].i].toLocaleString('en')}`;
  readout.replaceChildren(html('div', {class: 'soft'}, title), ...lines);
  readout.hidden = false;
  const wide = readout.offsetWidth;
  readout.style.top = '8px';
  readout.style.left = `${Math.max(0, at + 14 + wide > width ? at - 14 - wide : at + 14)}px`;
  for (const name of ['x1', 'x2']) cursor.setAttribute(name, at);
  cursor.setAttribute('visibility', 'visible');
}

/** A text of at most so many pixels, whole in its title. */
function label(text, pixels, attributes) {
  const most = Math.max(4, Math.floor(pixels / 6.6));
  const cut = text.length > most ? `${text.slice(0, most - 1)}…` : text;
  return svg('text', {class: 'name', ...attributes}, cut, svg('title', {}, text));
}

function drawFinals(box, width) {
  const arms = some();
  const numbers = arms.flatMap(({final}) => final ? [...final.values, final.low ?? final.mean, final.high ?? final.mean] : []);
  if (!numbers.length) return nothing('No final value to show.');
  const row = 30, top = 4, wanted = Math.max(...arms.map(arm => arm.label.length)) * 6.6 + 14;
  const left = Math.min(wanted, width * 0.36);
  const f = frame(box, width, top + row * arms.length + 40, {
    x: extent(numbers, 0.05), left, top, xlabel: `${DATA.metric}, ${DATA.split}${DATA.better}`,
  });
  const baseline = ARMS[DATA.baseline]?.final;
  if (baseline) f.root.append(svg('line', {class: 'front', x1: f.x(baseline.mean), x2: f.x(baseline.mean), y1: f.y0, y2: f.y1}));
  for (const [i, arm] of arms.entries()) {
    const y = top + row * (i + 0.42), {final, colour} = arm;
    f.root.append(label(arm.label, left - 8, {x: 0, y: y + 4}));
    if (!final) {
      f.root.append(svg('text', {x: (f.x0 + f.x1) / 2, y: y + 4, 'text-anchor': 'middle'}, arm.why));
      continue;
    }
    const group = svg('g', {'data-arm': arm.label});
    for (const v of final.values) group.append(svg('circle', {cx: f.x(v), cy: y + 9, r: 2.8, fill: colour, opacity: 0.65}));
    if (final.low !== null) group.append(svg('line', {x1: f.x(final.low), x2: f.x(final.high), y1: y, y2: y, stroke: colour, 'stroke-width': 2}));
    group.append(svg('line', {x1: f.x(final.mean), x2: f.x(final.mean), y1: y - 6, y2: y + 6, stroke: colour, 'stroke-width': 2.5}));
    f.root.append(group);
  }
  return [f.root];
}

let cost = Object.keys(DATA.costs)[0];

/** Arms that no other beats in cost and quality at once, the cheapest first. */
function front(arms) {
  const sign = DATA.lowerIsBetter ? 1 : -1;
  const sorted = arms.toSorted((a, b) => a.costs[cost] - b.costs[cost] || sign * (a.final.mean - b.final.mean));
  let best = Infinity;
  return sorted.filter(arm => sign * arm.final.mean < best && ((best = sign * arm.final.mean), true));
}

function drawPareto(box, width) {
  const arms = some().filter(arm => arm.final && arm.costs[cost] > 0);
  if (!arms.length) return nothing('No arm has this cost and a final value.');
  const costs = arms.map(arm => arm.costs[cost]), low = Math.min(...costs), high = Math.max(...costs);
  const log = high > 8 * low;
  const f = frame(box, width, Math.min(330, Math.max(250, width * 0.62)), {
    x: log ? [low / 1.4, high * 1.6] : extent(costs, 0.2), log, whole: cost !== 'seconds',
    y: extent(arms.flatMap(({final}) => [final.low ?? final.mean, final.high ?? final.mean]), 0.1),
    xlabel: `${DATA.costs[cost]}${log ? ', logarithmic' : ''}`,
  });
  const best = front(arms);
  const steps = best.flatMap((arm, i) => {
    const x = f.x(arm.costs[cost]), y = f.y(arm.final.mean);
    return i ? [`${x},${f.y(best[i - 1].final.mean)}`, `${x},${y}`] : [`${x},${y}`];
  });
  f.inside.append(svg('polyline', {class: 'front', points: [...steps, `${f.x1},${f.y(best.at(-1).final.mean)}`].join(' ')}));
  const taken = arms.map(arm => ({x: f.x(arm.costs[cost]) - 5, y: f.y(arm.final.mean) - 5, w: 10, h: 10}));
  for (const arm of arms) {
    const x = f.x(arm.costs[cost]), {mean, low, high} = arm.final;
    const group = svg('g', {'data-arm': arm.label});
    if (low !== null) group.append(svg('line', {x1: x, x2: x, y1: f.y(low), y2: f.y(high), stroke: arm.colour, 'stroke-width': 1.5, opacity: 0.6}));
    group.append(svg('circle', {cx: x, cy: f.y(mean), r: best.includes(arm) ? 5 : 4, fill: arm.colour}));
    group.append(place(arm.label, x, f.y(mean), f, taken));
    f.root.append(group);
  }
  return [f.root];
}

/** The name of a point beside it, where it covers nothing, if there is such a place. */
function place(text, x, y, f, taken) {
  const w = Math.min(text.length * 6.6, (f.x1 - f.x0) / 2), h = 13;
  const places = [[8, -6], [-8 - w, -6], [-w / 2, -22], [-w / 2, 9], [8, 6], [8, -20], [-8 - w, 6], [-8 - w, -20]]
    .map(([dx, dy]) => ({x: x + dx, y: y + dy, w, h}))
    .filter(b => b.x >= f.x0 - 4 && b.x + b.w <= f.x1 + 12);
  const free = places.find(b => !taken.some(t => b.x < t.x + t.w && t.x < b.x + b.w && b.y < t.y + t.h && t.y < b.y + b.h));
  const spot = free ?? places[0] ?? {x: f.x0, y: y - 6, w, h};
  taken.push(spot);
  const left = spot.x + w < x;
  const at = {x: left ? spot.x + w : spot.x, y: spot.y + 10, 'text-anchor': left ? 'end' : 'start'};
  return label(text, w + 7, at);
}

// ---------------------------------------------------------------------------------------- tasks

const heat = {show: 'score', colours: 'over all tasks'};

function drawHeat(table) {
  const rows = [...table.tBodies[0].rows].map(row => [...row.cells].slice(1)), places = Number(table.dataset.digits);
  const gap = heat.show !== 'score', number = cell => Number(gap ? cell.dataset.gap : cell.dataset.value);
  const there = cell => (gap ? cell.dataset.gap : cell.dataset.value) !== '';
  const range = cells => {
    const values = cells.filter(there).map(number);
    const low = Math.min(...values), high = Math.max(...values);
    return gap ? [0, Math.max(-low, high)] : [low, high];
  };
  const all = range(rows.flat());
  for (const row of rows) {
    const [low, high] = heat.colours === 'within each task' ? range(row) : all;
    for (const cell of row) {
      if (!there(cell)) { cell.textContent = '—'; cell.style.setProperty('--h', 0); continue; }
      const v = number(cell), size = gap ? Math.abs(v) : v;
      let h = high > low ? (size - low) / (high - low) : 0;
      if (!gap && DATA.lowerIsBetter && high > low) h = 1 - h;
      cell.style.setProperty('--h', h.toFixed(3));
      cell.textContent = (gap && v > 0 ? '+' : '') + minus(v.toFixed(places));
      cell.className = gap && v !== 0 ? ((v < 0) === DATA.lowerIsBetter ? 'good' : 'bad') : '';
    }
  }
}

// ---------------------------------------------------------------------------------------- start

function legend(box) {
  const buttons = ARMS.map((arm, i) => {
    const state = arm.state === 'done' ? '' : ` (${arm.state})`;
    const button = html('button', {type: 'button', 'aria-pressed': true}, swatch(arm), arm.label + state);
    button.addEventListener('click', () => show(i, !shown.has(i)));
    return button;
  });
  const show = (i, on) => {
    if (on) shown.add(i); else shown.delete(i);
    buttons[i].setAttribute('aria-pressed', on);
    for (const redraw of redraws) redraw();
  };
  box.append(...buttons);
  if (ARMS.length < 4) return;
  for (const [word, on] of [['all', true], ['none', false]]) {
    const button = html('button', {type: 'button', class: 'soft'}, word);
    button.addEventListener('click', () => ARMS.forEach((_, i) => show(i, on)));
    box.append(button);
  }
}

function redrawn(object, key) {
  return word => { object[key] = word; for (const redraw of redraws) redraw(); };
}

for (const table of document.querySelectorAll('table.sortable')) {
  if (table.tBodies[0].rows.length > 1) sortable(table);
}
if (ARMS.length > 1) legend(document.getElementById('legend'));
chart('curves', drawCurves);
chart('finals', drawFinals);
chart('pareto', drawPareto);
const over = ARMS.some(arm => arm.curve?.seconds) ? ['steps', 'seconds'] : ['steps'];
document.getElementById('curves-bar')?.append(
  choice('horizontal axis', over, redrawn(curves, 'over')),
  choice('vertical axis', ['later half', 'all'], redrawn(curves, 'range')),
);
document.getElementById('pareto-bar')?.append(
  choice('cost', Object.values(DATA.costs), word => {
    cost = Object.keys(DATA.costs).find(key => DATA.costs[key] === word);
    for (const redraw of redraws) redraw();
  }),
);
const tasks = document.querySelector('table.heat');
if (tasks) {
  const set = key => word => { heat[key] = word; drawHeat(tasks); };
  const compared = ARMS[DATA.baseline] ? ['score', `difference to ${ARMS[DATA.baseline].label}`] : ['score'];
  document.getElementById('tasks-bar').append(
    choice('numbers', compared, set('show')),
    choice('colours', ['over all tasks', 'within each task'], set('colours')),
  );
  drawHeat(tasks);
}
