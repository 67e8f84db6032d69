'use strict';
// Sort the tables and draw the figures from the numbers in the page; nothing is fetched. Text from
// runs becomes text nodes and never markup.

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

/** Return a row of buttons, one of them pressed; calls onChange(text) when another is pressed. */
function makeSwitch(name, texts, onChange) {
  const box = html('span', {class: 'switch', role: 'group', 'aria-label': name});
  for (const [i, text] of texts.entries()) {
    const button = html('button', {type: 'button', 'aria-pressed': i === 0}, text);
    button.addEventListener('click', () => {
      for (const child of box.children) child.setAttribute('aria-pressed', child === button);
      onChange(text);
    });
    box.append(button);
  }
  return box;
}

// ---------------------------------------------------------------------------------------- sorting

const NEXT = {none: 'ascending', ascending: 'descending', descending: 'none'};

/** Turn the header cells of a table into buttons that sort its rows. */
function makeSortable(table) {
  const body = table.tBodies[0], rows = [...body.rows], headers = [...table.tHead.rows[0].cells];
  for (const [column, header] of headers.entries()) {
    const button = html('button', {type: 'button'}, ...header.childNodes);
    header.append(button);
    header.setAttribute('aria-sort', 'none');
    button.addEventListener('click', () => {
      const order = NEXT[header.getAttribute('aria-sort')];
      for (const cell of headers) cell.setAttribute('aria-sort', 'none');
      header.setAttribute('aria-sort', order);
      body.append(...(order === 'none' ? rows : sortRows(rows, column, order === 'ascending' ? 1 : -1)));
    });
  }
}

/** Sort by data-value where it exists, otherwise by text; empty cells come last. */
function sortRows(rows, column, sign) {
  const key = ({cells: {[column]: cell}}) => cell.dataset.value ?? cell.textContent.replace(/^—$/, '');
  const isNumeric = rows.some(row => row.cells[column].dataset.value !== undefined);
  return rows.toSorted((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === '' || y === '') return (x === '') - (y === '');
    return sign * (isNumeric ? x - y : x.localeCompare(y, undefined, {numeric: true}));
  });
}

// ---------------------------------------------------------------------------------------- scales

/** Return about `count` round numbers in [low, high], integers if `integer`, and their labels. */
function ticks(low, high, count, integer = false) {
  const rough = (high - low || Math.abs(high) || 1) / count, power = 10 ** Math.floor(Math.log10(rough));
  const round = power * [1, 2, 2.5, 5, 10].find(x => x * power >= rough * 0.999);
  const step = integer ? Math.max(1, Math.ceil(round - 1e-9)) : round;
  const values = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) values.push(i * step);
  return {values, labels: formatTicks(values)};
}

/** Return powers of ten in [low, high], both above 0, with 2 and 5 between them if they fit. */
function decades(low, high, count) {
  const first = Math.floor(Math.log10(low) + 1e-9), last = Math.floor(Math.log10(high) + 1e-9);
  const stride = Math.max(1, Math.ceil((last - first + 1) / count)), values = [];
  const mantissas = 3 * (last - first) <= 2 * count ? [1, 2, 5] : [1];
  for (let power = first; power <= last; power += stride) {
    values.push(...mantissas.map(x => x * 10 ** power).filter(v => v >= low * 0.999 && v <= high * 1.001));
  }
  return {values, labels: values.map(v => formatTicks([v])[0])};
}

/** Format numbers with a common unit prefix and distinct digits: 429.5k, 430.0k. */
function formatTicks(values) {
  const sizes = values.filter(v => v !== 0).map(Math.abs);
  if (!sizes.length) return values.map(String);
  const units = [[1e12, 'T'], [1e9, 'G'], [1e6, 'M'], [1e3, 'k']];
  const isPlain = values.length > 1 && Math.max(...sizes) < 1e4;
  const [scale, unit] = isPlain ? [1, ''] : units.find(([size]) => Math.min(...sizes) >= size * 0.999) ?? [1, ''];
  const scaled = values.map(v => v / scale), sorted = scaled.toSorted((a, b) => a - b);
  const gaps = sorted.slice(1).map((v, i) => v - sorted[i]).filter(gap => gap > 0);
  const allowed = gaps.length ? Math.min(...gaps) * 1e-3 : Math.max(...scaled.map(Math.abs)) * 5e-3;
  let decimals = 0;
  while (decimals < 15 && scaled.some(v => Math.abs(v - Number(v.toFixed(decimals))) > allowed)) decimals++;
  return scaled.map(v => v === 0 ? '0' : setMinus(v.toFixed(decimals)) + unit);
}

function setMinus(text) {
  return text.replace('-', '−');
}

function countDecimals(low, high) {
  return Math.min(6, Math.max(0, 2 - Math.floor(Math.log10(high - low || Math.abs(high) || 1))));
}

/** Return a frame with axes: x and y map numbers to pixels, `inside` is clipped to the frame. */
function makeFrame(box, width, height, options) {
  const {left = 52, right = 10, top = 10, bottom = 40} = options;
  const [x0, x1, y0, y1] = [left, width - right, height - bottom, top];
  const map = (lo, hi, a, b, f = v => v) => v => a + (b - a) * (f(v) - f(lo)) / (f(hi) - f(lo) || 1);
  const x = map(options.x[0], options.x[1], x0, x1, options.log ? Math.log : undefined);
  const y = options.y ? map(options.y[0], options.y[1], y0, y1) : null;
  const root = svg('svg', {viewBox: `0 0 ${width} ${height}`, 'aria-hidden': true});
  // The horizontal axis.
  const count = Math.max(2, Math.floor((x1 - x0) / 75));
  const xTicks = options.log ? decades(...options.x, count) : ticks(...options.x, count, options.integer);
  for (const [i, v] of xTicks.values.entries()) {
    root.append(svg('line', {class: 'grid', x1: x(v), x2: x(v), y1: y0, y2: options.y ? y0 + 4 : y1}));
    root.append(svg('text', {x: x(v), y: y0 + 17, 'text-anchor': 'middle'}, xTicks.labels[i]));
  }
  root.append(svg('line', {class: 'axis', x1: x0, x2: x1, y1: y0, y2: y0}));
  root.append(svg('text', {x: (x0 + x1) / 2, y: y0 + 35, 'text-anchor': 'middle'}, options.xlabel));
  // The vertical axis.
  if (options.y) {
    const yTicks = ticks(...options.y, Math.max(2, Math.floor((y0 - y1) / 42)));
    for (const [i, v] of yTicks.values.entries()) {
      root.append(svg('line', {class: 'grid', x1: x0, x2: x1, y1: y(v), y2: y(v)}));
      root.append(svg('text', {x: x0 - 7, y: y(v) + 4, 'text-anchor': 'end'}, yTicks.labels[i]));
    }
  }
  const id = `${box.id}-clip`;
  root.append(svg('clipPath', {id}, svg('rect', {x: x0, y: y1 - 2, width: Math.max(0, x1 - x0 + 4), height: y0 - y1 + 3})));
  const inside = svg('g', {'clip-path': `url(#${id})`});
  root.append(inside);
  return {root, inside, x, y, x0, x1, y0, y1};
}

/** Call draw(box, width) now, when the width changes, and when the shown arms change. */
function addChart(id, draw) {
  const box = document.getElementById(id);
  if (!box) return;
  let width = 0;
  const redraw = () => { if (width > 0) box.replaceChildren(...draw(box, width)); };
  redraws.push(redraw);
  new ResizeObserver(([entry]) => {
    const newWidth = Math.round(entry.contentRect.width);
    if (newWidth !== width) { width = newWidth; redraw(); }
  }).observe(box);
}

/** Return a piece of an arm's line, for legends. */
function makeSwatch(arm) {
  const line = svg('line', {x1: 0, x2: 24, y1: 5, y2: 5, stroke: arm.color, 'stroke-width': 2.5, 'stroke-dasharray': arm.dash});
  return svg('svg', {class: 'swatch', viewBox: '0 0 24 10', 'aria-hidden': true}, line);
}

function shownArms() {
  return [...shown].sort((a, b) => a - b).map(i => ARMS[i]);
}

function placeholder(text) {
  return [html('p', {class: 'soft'}, text)];
}

function extent(values, margin) {
  const low = Math.min(...values), high = Math.max(...values);
  // Numbers that differ by rounding alone are equal: no step between them is one of their type.
  const spread = high - low > 1e-9 * Math.max(Math.abs(low), Math.abs(high)) ? high - low : 0;
  const padding = margin * spread || 0.05 * Math.abs(high) || 1;
  return [low - padding, high + padding];
}

// ---------------------------------------------------------------------------------------- figures

const curves = {over: 'steps', range: 'later half'};

/** Draw the learning curves with their bands, and a readout beside the pointer. */
function drawCurves(box, width) {
  const xs = arm => curves.over === 'steps' ? arm.curve.steps : arm.curve.seconds;
  const arms = shownArms().filter(arm => arm.curve && xs(arm));
  if (!arms.length) return placeholder('No curve to show.');
  // Find the ranges of the axes.
  const last = Math.max(...arms.map(arm => xs(arm).at(-1)));
  const half = curves.range === 'all' ? 0 : last / 2, ys = [];
  for (const arm of arms) {
    const {mean, low, high} = arm.curve;
    mean.forEach((v, i) => { if (xs(arm)[i] >= half) ys.push(v, low?.[i] ?? v, high?.[i] ?? v); });
  }
  const f = makeFrame(box, width, Math.min(440, Math.max(260, width * 0.42)), {
    x: [0, last || 1], y: extent(ys, 0.06), integer: curves.over === 'steps',
    xlabel: `training ${curves.over}`,
  });
  // Draw a band and a line per arm.
  for (const arm of arms) {
    const {mean, low, high} = arm.curve, points = (values, order) => order.map(i => `${f.x(xs(arm)[i]).toFixed(1)},${f.y(values[i]).toFixed(1)}`);
    const forward = [...mean.keys()], backward = forward.toReversed();
    const group = svg('g', {'data-arm': arm.label});
    if (low) group.append(svg('polygon', {class: 'band', fill: arm.color, points: [...points(high, forward), ...points(low, backward)].join(' ')}));
    group.append(svg('polyline', {class: 'line', stroke: arm.color, 'stroke-dasharray': arm.dash, points: points(mean, forward).join(' ')}));
    if (mean.length === 1) group.append(svg('circle', {cx: f.x(xs(arm)[0]), cy: f.y(mean[0]), r: 3, fill: arm.color}));
    f.inside.append(group);
  }
  // Follow the pointer.
  const cursor = svg('line', {class: 'grid', y1: f.y0, y2: f.y1, visibility: 'hidden'});
  const readout = html('div', {class: 'readout', hidden: ''});
  f.root.append(cursor);
  f.root.addEventListener('pointermove', event => {
    const scale = width / f.root.getBoundingClientRect().width;
    const position = (event.offsetX * scale - f.x0) / (f.x1 - f.x0) * last;
    showReadout(arms, xs, Math.min(last, Math.max(0, position)), f, cursor, readout, width);
  });
  f.root.addEventListener('pointerleave', () => {
    readout.hidden = true;
    cursor.setAttribute('visibility', 'hidden');
  });
  return [f.root, readout];
}

/** Show the value of each curve at its point nearest to x, the highest first, beside the cursor. */
function showReadout(arms, xs, x, f, cursor, readout, width) {
  const nearest = arm => xs(arm).reduce((best, v, i, all) => Math.abs(v - x) < Math.abs(all[best] - x) ? i : best, 0);
  const points = arms.map(arm => ({arm, i: nearest(arm)})).toSorted((a, b) => b.arm.curve.mean[b.i] - a.arm.curve.mean[a.i]);
  const values = points.map(({arm, i}) => arm.curve.mean[i]);
  const decimals = Math.max(2, countDecimals(Math.min(...values), Math.max(...values)));
  const format = v => setMinus(v.toFixed(Math.min(decimals, 4)));
  const lines = points.map(({arm, i}) => {
    const {mean, low, high} = arm.curve;
    const interval = low ? ` [${format(low[i])}, ${format(high[i])}]` : '';
    return html('div', {}, makeSwatch(arm), `${format(mean[i])}${interval} ${arm.label}`);
  });
  const cursorX = f.x(xs(points[0].arm)[points[0].i]);
  const title = `${curves.over === 'steps' ? 'step' : 'second'} ${xs(points[0].arm)[points[0].i].toLocaleString('en')}`;
  readout.replaceChildren(html('div', {class: 'soft'}, title), ...lines);
  readout.hidden = false;
  const boxWidth = readout.offsetWidth;
  readout.style.top = '8px';
  readout.style.left = `${Math.max(0, cursorX + 14 + boxWidth > width ? cursorX - 14 - boxWidth : cursorX + 14)}px`;
  for (const name of ['x1', 'x2']) cursor.setAttribute(name, cursorX);
  cursor.setAttribute('visibility', 'visible');
}

/** Return a text cut to a width in pixels; its title holds the full text. */
function makeLabel(text, pixels, attributes) {
  const maxLength = Math.max(4, Math.floor(pixels / 6.6));
  const cut = text.length > maxLength ? `${text.slice(0, maxLength - 1)}…` : text;
  return svg('text', {class: 'name', ...attributes}, cut, svg('title', {}, text));
}

/** Draw a row per arm: a dot per seed, a bar at the mean, a line for its interval. */
function drawFinals(box, width) {
  const arms = shownArms();
  const numbers = arms.flatMap(({final}) => final ? [...final.values, final.low ?? final.mean, final.high ?? final.mean] : []);
  if (!numbers.length) return placeholder('No final value to show.');
  const row = 30, top = 4, labelWidth = Math.max(...arms.map(arm => arm.label.length)) * 6.6 + 14;
  const left = Math.min(labelWidth, width * 0.36);
  const f = makeFrame(box, width, top + row * arms.length + 40, {
    x: extent(numbers, 0.05), left, top, xlabel: `${DATA.metric}, ${DATA.split}${DATA.better}`,
  });
  const baseline = ARMS[DATA.baseline]?.final;
  if (baseline) f.root.append(svg('line', {class: 'front', x1: f.x(baseline.mean), x2: f.x(baseline.mean), y1: f.y0, y2: f.y1}));
  for (const [i, arm] of arms.entries()) {
    const y = top + row * (i + 0.42), {final, color} = arm;
    f.root.append(makeLabel(arm.label, left - 8, {x: 0, y: y + 4}));
    if (!final) {
      f.root.append(svg('text', {x: (f.x0 + f.x1) / 2, y: y + 4, 'text-anchor': 'middle'}, arm.why));
      continue;
    }
    const group = svg('g', {'data-arm': arm.label});
    for (const v of final.values) group.append(svg('circle', {cx: f.x(v), cy: y + 9, r: 2.8, fill: color, opacity: 0.65}));
    if (final.low !== null) group.append(svg('line', {x1: f.x(final.low), x2: f.x(final.high), y1: y, y2: y, stroke: color, 'stroke-width': 2}));
    group.append(svg('line', {x1: f.x(final.mean), x2: f.x(final.mean), y1: y - 6, y2: y + 6, stroke: color, 'stroke-width': 2.5}));
    f.root.append(group);
  }
  return [f.root];
}

let cost = Object.keys(DATA.costs)[0];

/** Return the arms of one problem that no other beats in both cost and quality, the cheapest first. */
function findFront(arms) {
  const sign = DATA.lowerIsBetter ? 1 : -1;
  const sorted = arms.toSorted((a, b) => a.costs[cost] - b.costs[cost] || sign * (a.final.mean - b.final.mean));
  let best = Infinity;
  return sorted.filter(arm => sign * arm.final.mean < best && ((best = sign * arm.final.mean), true));
}

/** Draw the final value of each arm against its cost, and a line through the front of each problem. */
function drawPareto(box, width) {
  const arms = shownArms().filter(arm => arm.final && arm.costs[cost] > 0);
  if (!arms.length) return placeholder('No arm has this cost and a final value.');
  const costs = arms.map(arm => arm.costs[cost]), low = Math.min(...costs), high = Math.max(...costs);
  const isLog = high > 8 * low;
  const f = makeFrame(box, width, Math.min(330, Math.max(250, width * 0.62)), {
    x: isLog ? [low / 1.4, high * 1.6] : extent(costs, 0.2), log: isLog, integer: cost !== 'seconds',
    y: extent(arms.flatMap(({final}) => [final.low ?? final.mean, final.high ?? final.mean]), 0.1),
    xlabel: `${DATA.costs[cost]}${isLog ? ', logarithmic' : ''}`,
  });
  // Draw the front of each problem as steps.
  const problems = [...new Set(arms.map(arm => arm.problem))];
  const fronts = problems.map(problem => findFront(arms.filter(arm => arm.problem === problem)));
  for (const front of fronts) {
    const steps = front.flatMap((arm, i) => {
      const x = f.x(arm.costs[cost]), y = f.y(arm.final.mean);
      return i ? [`${x},${f.y(front[i - 1].final.mean)}`, `${x},${y}`] : [`${x},${y}`];
    });
    f.inside.append(svg('polyline', {class: 'front', points: [...steps, `${f.x1},${f.y(front.at(-1).final.mean)}`].join(' ')}));
  }
  // Draw each arm, with its label where it covers nothing.
  const occupied = arms.map(arm => ({x: f.x(arm.costs[cost]) - 5, y: f.y(arm.final.mean) - 5, w: 10, h: 10}));
  for (const arm of arms) {
    const x = f.x(arm.costs[cost]), {mean, low, high} = arm.final;
    const group = svg('g', {'data-arm': arm.label});
    if (low !== null) group.append(svg('line', {x1: x, x2: x, y1: f.y(low), y2: f.y(high), stroke: arm.color, 'stroke-width': 1.5, opacity: 0.6}));
    group.append(svg('circle', {cx: x, cy: f.y(mean), r: fronts.flat().includes(arm) ? 5 : 4, fill: arm.color}));
    group.append(placeLabel(arm.label, x, f.y(mean), f, occupied));
    f.root.append(group);
  }
  return [f.root];
}

/** Return a label beside a point, where it covers nothing if there is such a place. */
function placeLabel(text, x, y, f, occupied) {
  const w = Math.min(text.length * 6.6, (f.x1 - f.x0) / 2), h = 13;
  const boxes = [[8, -6], [-8 - w, -6], [-w / 2, -22], [-w / 2, 9], [8, 6], [8, -20], [-8 - w, 6], [-8 - w, -20]]
    .map(([dx, dy]) => ({x: x + dx, y: y + dy, w, h}))
    .filter(b => b.x >= f.x0 - 4 && b.x + b.w <= f.x1 + 12);
  const overlaps = (a, b) => a.x < b.x + b.w && b.x < a.x + a.w && a.y < b.y + b.h && b.y < a.y + a.h;
  const free = boxes.find(box => !occupied.some(neighbor => overlaps(box, neighbor)));
  const chosen = free ?? boxes[0] ?? {x: f.x0, y: y - 6, w, h};
  occupied.push(chosen);
  const isLeft = chosen.x + w < x;
  const position = {x: isLeft ? chosen.x + w : chosen.x, y: chosen.y + 10, 'text-anchor': isLeft ? 'end' : 'start'};
  return makeLabel(text, w + 7, position);
}

// ---------------------------------------------------------------------------------------- tasks

const heat = {show: 'score', colors: 'over all tasks'};

/** Write and color the cells of the table of tasks: scores, or differences to the baseline. */
function drawHeat(table) {
  const rows = [...table.tBodies[0].rows].map(row => [...row.cells].slice(1)), decimals = Number(table.dataset.digits);
  const isGap = heat.show !== 'score', number = cell => Number(isGap ? cell.dataset.gap : cell.dataset.value);
  const hasNumber = cell => (isGap ? cell.dataset.gap : cell.dataset.value) !== '';
  const range = cells => {
    const values = cells.filter(hasNumber).map(number);
    const low = Math.min(...values), high = Math.max(...values);
    return isGap ? [0, Math.max(-low, high)] : [low, high];
  };
  const fullRange = range(rows.flat());
  for (const row of rows) {
    const [low, high] = heat.colors === 'within each task' ? range(row) : fullRange;
    for (const cell of row) {
      if (!hasNumber(cell)) { cell.textContent = '—'; cell.style.setProperty('--h', 0); continue; }
      const v = number(cell), size = isGap ? Math.abs(v) : v;
      let h = high > low ? (size - low) / (high - low) : 0;
      if (!isGap && DATA.lowerIsBetter && high > low) h = 1 - h;
      cell.style.setProperty('--h', h.toFixed(3));
      cell.textContent = (isGap && v > 0 ? '+' : '') + setMinus(v.toFixed(decimals));
      cell.className = isGap && v !== 0 ? ((v < 0) === DATA.lowerIsBetter ? 'good' : 'bad') : '';
    }
  }
}

// ---------------------------------------------------------------------------------------- start

/** Fill the legend with a button per arm, which shows and hides it in all figures. */
function addLegend(box) {
  const buttons = ARMS.map((arm, i) => {
    const state = arm.state === 'done' ? '' : ` (${arm.state})`;
    const button = html('button', {type: 'button', 'aria-pressed': true}, makeSwatch(arm), arm.label + state);
    button.addEventListener('click', () => show(i, !shown.has(i)));
    return button;
  });
  const show = (i, visible) => {
    if (visible) shown.add(i); else shown.delete(i);
    buttons[i].setAttribute('aria-pressed', visible);
    redrawAll();
  };
  box.append(...buttons);
  if (ARMS.length < 4) return;
  for (const [text, visible] of [['all', true], ['none', false]]) {
    const button = html('button', {type: 'button', class: 'soft'}, text);
    button.addEventListener('click', () => ARMS.forEach((_, i) => show(i, visible)));
    box.append(button);
  }
}

function redrawAll() {
  for (const redraw of redraws) redraw();
}

for (const table of document.querySelectorAll('table.sortable')) {
  if (table.tBodies[0].rows.length > 1) makeSortable(table);
}
if (ARMS.length > 1) addLegend(document.getElementById('legend'));
addChart('curves', drawCurves);
addChart('finals', drawFinals);
addChart('pareto', drawPareto);
const units = ARMS.some(arm => arm.curve?.seconds) ? ['steps', 'seconds'] : ['steps'];
document.getElementById('curves-bar')?.append(
  makeSwitch('horizontal axis', units, text => { curves.over = text; redrawAll(); }),
  makeSwitch('vertical axis', ['later half', 'all'], text => { curves.range = text; redrawAll(); }),
);
document.getElementById('pareto-bar')?.append(
  makeSwitch('cost', Object.values(DATA.costs), text => {
    cost = Object.keys(DATA.costs).find(key => DATA.costs[key] === text);
    redrawAll();
  }),
);
const tasks = document.querySelector('table.heat');
if (tasks) {
  const set = key => text => { heat[key] = text; drawHeat(tasks); };
  const numbers = ARMS[DATA.baseline] ? ['score', `difference to ${ARMS[DATA.baseline].label}`] : ['score'];
  document.getElementById('tasks-bar').append(
    makeSwitch('numbers', numbers, set('show')),
    makeSwitch('colors', ['over all tasks', 'within each task'], set('colors')),
  );
  drawHeat(tasks);
}
